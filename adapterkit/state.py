"""What is attached to a model. The state lives on the model, so every handle on it sees the same."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from adapterkit import attach
from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.attach import Slots, Switch
from adapterkit.compose import Selection
from adapterkit.errors import AttachError, StateError
from adapterkit.mapping import MappedModel
from adapterkit.points import InjectionPoint

STATE = "_adapterkit_state"
"""Key under which every root component of an adapted model keeps the shared state."""


@dataclass(frozen=True)
class Attached:
    """One named adapter: what was asked for, and where it acts."""

    config: AdapterConfig
    points: Mapping[str, InjectionPoint]


@dataclass
class Merge:
    """Weights that stand in for adapters, and the parameters that they replace."""

    selection: Selection
    before: Selection
    originals: list[tuple[nn.Module, str, nn.Parameter | None]]


@dataclass
class State:
    """The adapters of one model or pipeline, and what must be restored when they go."""

    mapped: MappedModel
    switch: Switch = field(default_factory=Switch)
    adapters: dict[str, Attached] = field(default_factory=dict)
    merge: Merge | None = None
    base_flags: dict[tuple[str, str], bool] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def modules(self, name: str) -> dict[str, AdapterModule]:
        """Point id -> adapter module."""
        found: dict[str, AdapterModule] = {}
        for key, point in self.adapters[name].points.items():
            found[key] = attach.find(self.mapped.module(point), point, name)
        return found

    def insert(self, name: str, config: AdapterConfig, points: Iterable[InjectionPoint], built: Mapping[str, AdapterModule]) -> None:
        """Attaches built modules, all of them or none.

        Raises:
            AttachError: A module cannot be adapted in place.
        """
        points = list(points)
        seams = {point.id: self.mapped.seam(point) for point in points}
        problems = [f"{point.full_path}: {reason}" for point in points if (reason := self._refusal(point, seams[point.id]))]
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise AttachError(f"cannot attach {name!r}: {shown}")
        done: list[InjectionPoint] = []
        try:
            for point in points:
                done.append(point)
                attach.attach(self.mapped.root(point), point, name, built[point.id], self.switch, seams[point.id])
        except BaseException:
            for point in done:
                attach.detach(self.mapped.root(point), point, name)
            raise
        self.adapters[name] = Attached(config, {point.id: point for point in points})
        for component in self.mapped.components.values():
            component.root.__dict__[STATE] = self

    def _refusal(self, point: InjectionPoint, seam: attach.AttentionSeam | None) -> str | None:
        module = self.mapped.module(point)
        return attach.refusal(module) or (seam.refusal(module) if seam is not None else None)

    def discard(self, name: str) -> None:
        """Takes one adapter away; the last one leaves the model as it was found."""
        attached = self.adapters[name]
        stuck = [p.full_path for p in attached.points.values() if not attach.is_adapted(self.mapped.module(p))]
        if stuck:
            raise StateError(
                f"cannot detach {name!r}: the class of {stuck[0]} (and {len(stuck) - 1} more) was changed after attaching, "
                "by sharding or parametrizing; undo that first"
            )
        for point in attached.points.values():
            attach.detach(self.mapped.root(point), point, name)
        del self.adapters[name]
        self.switch.default = self.switch.default.without(frozenset({name}))
        if not self.adapters:
            self._restore_base()

    def base_parameters(self) -> Iterator[tuple[tuple[str, str], nn.Parameter]]:
        """(component, name) and parameter of everything that is no adapter's."""
        for component in self.mapped.components.values():
            adapters = {id(p) for m in component.root.modules() if isinstance(m, Slots) for p in m.parameters()}
            for name, parameter in component.root.named_parameters():
                if id(parameter) not in adapters:
                    yield (component.name, name), parameter

    def freeze_base(self) -> None:
        """Freezes the base; how each parameter was found is remembered the first time."""
        for key, parameter in self.base_parameters():
            self.base_flags.setdefault(key, parameter.requires_grad)
            parameter.requires_grad_(False)

    def _restore_base(self) -> None:
        for key, parameter in self.base_parameters():
            if key in self.base_flags:
                parameter.requires_grad_(self.base_flags[key])
        self.base_flags.clear()
        for component in self.mapped.components.values():
            component.root.__dict__.pop(STATE, None)


def state_of(mapped: MappedModel) -> State | None:
    """The state that a model, or any component of a pipeline, already has."""
    for component in mapped.components.values():
        if isinstance(state := component.root.__dict__.get(STATE), State):
            return state
    return None
