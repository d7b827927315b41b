"""What is attached to a model. The state lives on the model, so every handle on it sees the same."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.backend import AttentionSeam, Reach
from adapterkit.engine import attach
from adapterkit.engine.selection import Selection
from adapterkit.engine.slots import Slots
from adapterkit.engine.switch import Switch
from adapterkit.errors import AttachError, StateError
from adapterkit.handle.building import Built, parameters_of
from adapterkit.handle.facts import Facts
from adapterkit.handle.stand_ins import Original
from adapterkit.mapping.model import MappedModel, map_model
from adapterkit.points import AttentionPoint, InjectionPoint, ParameterPoint

STATE = "_adapterkit_state"
"""Key under which every root component of an adapted model keeps the shared state."""


@dataclass(frozen=True)
class Attached:
    """One named adapter: what was asked for, where it acts, and its module at each point.

    Attributes:
        parts: One for each type in it, at points of their own.
        points, modules: Those of all parts, by the points' ids.
        facts: What they tell together.
        metadata: What its file says beside the tensors.
        held: Point id -> names of the parameters that the type itself built with `requires_grad=False`.
        reads: Names of the side inputs that it reads.
    """

    parts: Sequence[Built]
    points: Mapping[str, InjectionPoint]
    modules: Mapping[str, AdapterModule]
    facts: Facts
    metadata: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, frozenset[str]] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()

    @property
    def configs(self) -> list[AdapterConfig]:
        """What was asked for, of each type."""
        return [part.config for part in self.parts]

    @property
    def type_name(self) -> str:
        """What it is, for messages."""
        return " and ".join(type(config).__name__ for config in self.configs)


@dataclass
class Merge:
    """Weights that stand in for adapters, and the parameters that they replace."""

    selection: Selection
    originals: list[Original]


@dataclass
class State:
    """The adapters of one model or pipeline, and what must be restored when they go."""

    mapped: MappedModel
    switch: Switch = field(default_factory=Switch)
    adapters: dict[str, Attached] = field(default_factory=dict)
    merge: Merge | None = None
    trained: set[str] = field(default_factory=set)
    watched: dict[tuple[str, str], list[RemovableHandle]] = field(default_factory=dict)
    base_flags: dict[tuple[str, str], bool] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def insert(self, name: str, parts: Sequence[Built], metadata: Mapping[str, str] | None = None) -> None:
        """Attaches built modules as one adapter, all of them or none. Its parts lie at points of their own.

        Raises:
            AttachError: A module cannot be adapted in place.
        """
        points = [point for part in parts for point in part.points]
        modules = {key: module for part in parts for key, module in part.modules.items()}
        reads = _side_inputs(parts)
        reach = {point.id: self._reach(point, modules[point.id]) for point in points}
        refused = [(p, self._refusal(p, modules[p.id], reach[p.id])) for p in points]
        problems = [f"{point.full_path}: {reason}" for point, reason in refused if reason]
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise AttachError(f"cannot attach {name!r}: {shown}")
        done: list[InjectionPoint] = []
        try:
            for point in points:
                done.append(point)
                root = self.mapped.root(point)
                attach.attach(root, point, name, modules[point.id], self.switch, reach[point.id])
        except BaseException:
            for point in done:
                attach.detach(self.mapped.root(point), point, name)
            raise
        self._watch(points)
        by_id = {point.id: point for point in points}
        facts, held = Facts.of(by_id, modules), _held(modules)
        self.adapters[name] = Attached(tuple(parts), by_id, modules, facts, dict(metadata or {}), held, reads)
        self.set_trainable([name], value=False)
        for component in self.mapped.components.values():
            component.root.__dict__[STATE] = self

    def _reach(self, point: InjectionPoint, adapter: AdapterModule) -> Reach:
        reach = self.mapped.reach(point)
        if not isinstance(point, AttentionPoint) or not adapter.abilities.attend:
            return reach
        return dataclasses.replace(reach, projections=self.mapped.projections(point))

    def _refusal(self, point: InjectionPoint, adapter: AdapterModule, reach: Reach) -> str | None:
        module = self.mapped.module(point)
        if point.lengthens and point.layout.until is None and reach.lengthening is None:
            return "its backend says that the sequence can be made longer, but gives no `lengthening`, nor `until`"
        return attach.refusal(module) or (None if reach.seam is None else _unreached(reach.seam, module, adapter))

    def _watch(self, points: Iterable[InjectionPoint]) -> None:
        """Tells the switch of calls that may read a weight: of the module that holds its layer, and of the model."""
        unknown = [p for p in points if isinstance(p, ParameterPoint) and p.layout.access == "any"]
        for key in {(p.component, path): None for p in unknown if p.path for path in ("", p.path.rpartition(".")[0])}:
            module = self.mapped.components[key[0]].root.get_submodule(key[1])
            self.watched[key] = self.watched.get(key) or [
                module.register_forward_pre_hook(self.switch.enter),
                module.register_forward_hook(self.switch.leave, always_call=True),
            ]

    def discard(self, name: str) -> None:
        """Takes one adapter away; the last one leaves the model as it was found."""
        attached = self.adapters[name]
        stuck = [p.full_path for p in attached.points.values() if not attach.is_adapted(self.mapped.module(p))]
        if stuck:
            raise StateError(
                f"cannot detach {name!r}: the class of {stuck[0]} (and {len(stuck) - 1} more) was changed "
                "after attaching, by sharding or parametrizing; undo that first"
            )
        for point in attached.points.values():
            attach.detach(self.mapped.root(point), point, name)
        del self.adapters[name]
        self.trained.discard(name)
        self.switch.forget(name)
        if not self.adapters:
            self._restore_base()

    def base_parameters(self) -> Iterator[tuple[tuple[str, str], nn.Parameter]]:
        """(component, name) and parameter of everything that is no adapter's; a shared one once."""
        seen: set[int] = set()
        for component in self.mapped.components.values():
            for prefix, module in _base_modules(component.root, ""):
                for name, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield (component.name, f"{prefix}{name}"), parameter

    def train(self, names: Iterable[str]) -> None:
        """Lets these adapters, and nothing else, require grad. How the base was found is remembered the first time."""
        for key, parameter in self.base_parameters():
            self.base_flags.setdefault(key, parameter.requires_grad)
            parameter.requires_grad_(False)
        names = set(names)
        self.set_trainable(self.trained - names, value=False)
        self.set_trainable(names, value=True)

    def set_trainable(self, names: Iterable[str], *, value: bool) -> None:
        """Sets requires_grad of whole adapters, but for what their types hold."""
        for name in set(names):
            attached = self.adapters[name]
            for point, module in attached.modules.items():
                for parameter in parameters_of([module]):
                    parameter.requires_grad_(value)
                for key in attached.held.get(point, ()):
                    module.get_parameter(key).requires_grad_(False)
            (self.trained.add if value else self.trained.discard)(name)

    def _restore_base(self) -> None:
        for key, parameter in self.base_parameters():
            if key in self.base_flags:
                parameter.requires_grad_(self.base_flags[key])
        self.base_flags.clear()
        for handle in (handle for handles in self.watched.values() for handle in handles):
            handle.remove()
        self.watched.clear()
        for component in self.mapped.components.values():
            component.root.__dict__.pop(STATE, None)


def _held(modules: Mapping[str, AdapterModule]) -> dict[str, frozenset[str]]:
    """Of modules as they were built: point id -> names of the parameters that do not require grad, where there are."""
    holding = {key: one for key, one in modules.items() if not all(p.requires_grad for p in parameters_of([one]))}
    return {
        key: frozenset(name for name, parameter in one.named_parameters() if not parameter.requires_grad)
        for key, one in holding.items()
    }


def _side_inputs(parts: Sequence[Built]) -> frozenset[str]:
    """The names of what the types read as `base.context`."""
    with torch.device("meta"):
        return frozenset(name for part in parts for name in part.config.example_context(part.points, 1))


def _unreached(seam: AttentionSeam, module: nn.Module, adapter: AdapterModule) -> str | None:
    """Why a seam cannot do at a module what the adapter does with an attention."""
    return (seam.refusal(module) if adapter.abilities.extend else None) or (
        seam.attend_refusal(module) if adapter.abilities.attend else None
    )


def mapped_as_found(model: object, backend: str | None, roles: Mapping[str, str] | None) -> MappedModel:
    """`map_model`; where neither backend nor roles are given, as the adapters that are there already were placed.

    Raises:
        TargetNotFoundError, IncompatibleTargetError, ConfigError: The roles do not fit the model.
    """
    mapped = map_model(model, backend, roles)
    if roles is not None:
        mapped.points()  # finds a glob that matches nothing
    state = state_of(mapped)
    if backend is None and roles is None and state is not None and state.mapped.has_roots_of(mapped):
        return state.mapped
    return mapped


def state_of(mapped: MappedModel) -> State | None:
    """The state that a model, or any component of a pipeline, already has."""
    for component in mapped.components.values():
        if isinstance(state := component.root.__dict__.get(STATE), State):
            return state
    return None


def _base_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module that is no adapter's, with the prefix of its parameters' names. The cost is the base's alone."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, Slots):
            yield from _base_modules(child, f"{prefix}{name}.")
