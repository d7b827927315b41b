"""What an adapter is at a point, as a module again; and its factors in the coordinates of a foreign module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterkit.adapter import AdapterConfig, AdapterModule, AdditiveModule
from adapterkit.codec import Place, Said
from adapterkit.errors import CheckpointError, UnknownAdapterTypeError, did_you_mean
from adapterkit.factors import Factors
from adapterkit.plugins.manager import class_of, get_plugin_manager
from adapterkit.points import InjectionPoint


def module_of(said: Said, point: InjectionPoint, where: object = None) -> AdapterModule:
    """The module that holds what is said at a point, without what its points share.

    Raises:
        UnknownAdapterTypeError: The type is not installed.
        CheckpointError: The tensors are not the type's.
    """
    specs = get_plugin_manager().adapters()
    if said.type not in specs:
        raise UnknownAdapterTypeError(
            f"adapter type {said.type!r} is unknown here.{did_you_mean(said.type, specs)}", where, point.id
        )
    config = class_of(specs[said.type], AdapterConfig).from_dict(dict(said.config))
    module = _built(config, point).requires_grad_(False)
    try:
        module.load_state_dict(dict(said.tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"its tensors are not those of {said.type}: {error}", where, point.id) from error
    module.at = point.id
    return module.eval()


def _built(config: AdapterConfig, point: InjectionPoint) -> AdapterModule:
    """A module without values; with those that are in no file, and are computed, where there are some."""
    with torch.device("meta"):
        module = config.build(point)
    tensors = {name for named in (module.named_parameters(), module.named_buffers()) for name, _ in named}
    if tensors <= module.state_dict().keys():
        return module
    with torch.random.fork_rng(devices=[]):  # whatever a type draws is overwritten, and the caller's numbers stay
        return config.build(point)


def factors_of(said: Said, point: InjectionPoint, where: object = None) -> Factors | None:
    """The update as two thin factors; None for a type that has none."""
    module = module_of(said, point, where)
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
