"""The merged model for good: the weights of a merge, in a model that has no adapters any more.

A merge may do what a checkpoint of the base cannot hold: a bias where there was none, a dense layer in the place of a
quantized one, two weights where there was one. Here that is refused, or told to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapterkit.engine import attach
from adapterkit.engine.selection import Selection
from adapterkit.errors import NotMergeableError, StateError
from adapterkit.handle import merging
from adapterkit.handle.concurrency import require_unused
from adapterkit.handle.stand_ins import OriginalParameter
from adapterkit.handle.state import Merge, State
from adapterkit.mapping.component import Component


@dataclass(frozen=True)
class _Baked:
    """A parameter of the base, and what takes its place."""

    module: nn.Module
    name: str
    new: nn.Parameter

    def put(self) -> None:
        old = self.module._parameters[self.name]
        self.new.requires_grad_(old is not None and old.requires_grad)
        self.module._parameters[self.name] = self.new


@dataclass(frozen=True)
class _Tie:
    """The places of one parameter that several modules have."""

    component: Component
    names: list[str]

    @property
    def is_parted(self) -> bool:
        """Whether those places have different parameters now."""
        places = (name.rpartition(".") for name in self.names)
        root = self.component.root
        return len({id(root.get_submodule(path)._parameters.get(name)) for path, _, name in places}) > 1


def bake(state: State, selection: Selection) -> None:
    """Takes every adapter off, and leaves the selection in the weights.

    Raises:
        NotMergeableError: An adapter has no equivalent weight, or a checkpoint of the base could not hold the result.
        StateError: An adapter cannot be taken off. Nothing is changed in either case.
    """
    _check_removable(state)
    ties = _ties(state)
    with state.switch.held():
        merge = merging.merge(state, selection)
        try:
            baked, tellers = [*_baked(state, merge)], _tellers(merge, ties)
        finally:
            merging.unmerge(state)
        for name in reversed(list(state.adapters)):  # what combines others came after them
            state.discard(name)
        for one in baked:
            one.put()
    for tell in tellers:
        tell()


def _check_removable(state: State) -> None:
    require_unused(state.switch, state.adapters)
    points = [point for attached in state.adapters.values() for point in attached.points.values()]
    stuck = [point.full_path for point in points if not attach.is_adapted(state.module(point))]
    if stuck:
        raise StateError(
            f"cannot bake: the class of {stuck[0]} (and {len(stuck) - 1} more) was changed after attaching, by "
            "sharding or parametrizing; undo that first"
        )


def _baked(state: State, merge: Merge) -> Iterator[_Baked]:
    """What a merge has put in the place of parameters.

    Raises:
        NotMergeableError: A checkpoint of the base has no key or no shape for it.
    """
    roots = [(component.name, component.root) for component in state.mapped.models.values()]
    paths = {id(module): f"{name}.{path}" for name, root in roots for path, module in root.named_modules()}
    for original in merge.originals:
        where = paths.get(id(original.module), type(original.module).__name__)
        if not isinstance(original, OriginalParameter):
            raise NotMergeableError(
                f"{where} holds no plain weight (a quantized layer?), and a checkpoint of this base has no place for a "
                "dense one; load the base unquantized, load the adapter there, and bake that"
            )
        new: Any = original.module._parameters[original.name]
        if original.parameter is None:
            raise NotMergeableError(
                f"{where} has no {original.name}, and the merged layer would need one, for which a checkpoint of the "
                "base has no key; give the layer one of zeros before adding the adapter"
            )
        if new.shape != original.parameter.shape:
            raise NotMergeableError(
                f"{where}.{original.name} would be {tuple(new.shape)}, and the base's is "
                f"{tuple(original.parameter.shape)}; give the base a layer of that size before adding the adapter"
            )
        yield _Baked(original.module, original.name, new)


def _ties(state: State) -> Mapping[int, _Tie]:
    """The parameters that several modules have, by their ids."""
    found: dict[int, _Tie] = {}
    for component in state.mapped.models.values():
        for path, module in component.root.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    tie = found.setdefault(id(parameter), _Tie(component, []))
                    tie.names.append(f"{path}.{name}" if path else name)
    return {key: tie for key, tie in found.items() if len(tie.names) > 1}


def _tellers(merge: Merge, ties: Mapping[int, _Tie]) -> list[Callable[[], None]]:
    """What tells the models that weights, which were one, are several from now on.

    Raises:
        NotMergeableError: A model would make them one again.
    """
    parted: dict[str, list[_Tie]] = {}
    for key in dict.fromkeys(id(one.parameter) for one in merge.originals if isinstance(one, OriginalParameter)):
        if key in ties and ties[key].is_parted:
            parted.setdefault(ties[key].component.name, []).append(ties[key])
    tellers: list[Callable[[], None]] = []
    for several in parted.values():
        component = several[0].component
        with component.blaming("untying()"):
            tell = component.backend.untying(component.root, [tie.names for tie in several])
        if tell is None:
            raise NotMergeableError(
                f"{' and '.join(several[0].names)} are one weight. Baked they would be two, and nothing is known by "
                f"which {type(component.root).__name__} would not make them one again when it is loaded; give the "
                "adapted layer a weight of its own before adding the adapter"
            )
        tellers.append(tell)
    return tellers
