"""What an adapter is at a point, as a module again; and its factors in the coordinates of a foreign module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapterkit.adapter import AdapterConfig, AdapterModule, AdditiveModule
from adapterkit.contract.codec import Place, Said
from adapterkit.contract.factors import Factors
from adapterkit.engine.skeletons import Skeletons
from adapterkit.errors import CheckpointError, UnknownAdapterTypeError, did_you_mean
from adapterkit.plugins.manager import class_of, get_plugin_manager
from adapterkit.points import InjectionPoint

Made = dict[tuple[str, str], Skeletons]
"""What was built so far: points that are alike share the building."""


def module_of(said: Said, point: InjectionPoint, where: object = None, made: Made | None = None) -> AdapterModule:
    """The module that holds what is said at a point, without what its points share.

    Args:
        said: What.
        point: Where.
        where: What errors name.
        made: What was built for other points; see `Context.made`.

    Raises:
        UnknownAdapterTypeError: The type is not installed.
        CheckpointError: The tensors are not the type's.
    """
    made = {} if made is None else made
    key = said.type, repr(said.config)
    if key not in made:
        made[key] = _skeletons(said, point, where)
    module, skeleton = made[key].at(point, training=False)
    if skeleton.lacks:
        with torch.random.fork_rng(devices=[]):  # whatever a type draws is overwritten, and the caller's numbers stay
            module = made[key].config.build(point).requires_grad_(False).eval()
    try:
        if skeleton.lacks or not _fits(said.tensors, skeleton.expected):
            module.load_state_dict(dict(said.tensors), strict=True, assign=True)
        else:
            skeleton.fill(module, said.tensors)
    except RuntimeError as error:
        raise CheckpointError(f"its tensors are not those of {said.type}: {error}", where, point.id) from error
    module.at = point.id
    return module


def _skeletons(said: Said, point: InjectionPoint, where: object) -> Skeletons:
    specs = get_plugin_manager().adapters()
    if said.type not in specs:
        raise UnknownAdapterTypeError(
            f"adapter type {said.type!r} is unknown here.{did_you_mean(said.type, specs)}", where, point.id
        )
    config = class_of(specs[said.type], AdapterConfig).from_dict(dict(said.config))
    return Skeletons(config, lambda point: config.build(point).requires_grad_(False))


def _fits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether these are just the tensors of a module."""
    return tensors.keys() == expected.keys() and all(own.shape == expected[name].shape for name, own in tensors.items())


def factors_of(said: Said, point: InjectionPoint, where: object = None, made: Made | None = None) -> Factors | None:
    """The update as two thin factors; None for a type that has none. Arguments and errors as for `module_of`."""
    module = module_of(said, point, where, made)
    return module.factors() if isinstance(module, AdditiveModule) else None


def joined(factors: Sequence[tuple[Place, Factors]]) -> tuple[Tensor, Tensor, float]:
    """The factors of a whole foreign module from those of its points: exact, of the smallest rank that needs no SVD.

    Args:
        factors: Of the points of one module, at least one. Rows of no point get zeros.

    Returns:
        A [rank, in / groups, *kernel], B [out, rank] and the scale on their product.
    """
    first, one = factors[0]
    scale = one.scale
    if len(factors) == 1 and first.whole:
        return one.A, one.B, scale
    scaled = [(place, f.A, f.B if f.scale == scale else f.B * (f.scale / scale)) for place, f in factors]
    if _see_columns(scaled):
        return sum((_widened(a, place) for place, a, _ in scaled), torch.zeros(())), scaled[0][2], scale
    wide = [(place, _widened(a, place), b) for place, a, b in scaled]
    alike = all(torch.equal(a, wide[0][1]) for _, a, _ in wide[1:])
    a_all = wide[0][1] if alike else torch.cat([a for _, a, _ in wide])
    b_all = wide[0][2].new_zeros(first.shape[0], len(a_all))
    at = 0
    for place, a, b in wide:
        rows = slice(None) if place.rows is None else place.rows
        b_all[rows if isinstance(rows, slice) else list(rows), at : at + len(a)] = b
        at += 0 if alike else len(a)
    return a_all, b_all, scale


def _see_columns(parts: Sequence[tuple[Place, Tensor, Tensor]]) -> bool:
    """Whether parts are columns of one A, with the same B."""
    first = parts[0][2]
    apart = all(place.rows is None and place.columns is not None for place, _, _ in parts)
    return (
        apart
        and len({place.point.id for place, _, _ in parts}) == len(parts)
        and all(torch.equal(b, first) for _, _, b in parts)
    )


def _widened(a: Tensor, place: Place) -> Tensor:
    """A factor that sees all of the module's inputs."""
    if place.columns is None:
        return a
    wide = a.new_zeros(len(a), *place.shape[1:])
    columns = place.columns if isinstance(place.columns, slice) else list(place.columns)
    wide[:, columns] = a
    return wide


def folded(b: Tensor, scale: float, alpha: float, rank: int) -> Tensor:
    """B for a file that says another alpha: `scale B = alpha / rank B'`."""
    factor = scale * rank / alpha
    return b if factor == 1.0 else b * factor
