"""What is attached to a model. The state lives on the model, so every handle on it sees the same."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.engine import attach
from adapterkit.engine.attach import Spot
from adapterkit.engine.selection import Selection
from adapterkit.engine.switch import Switch
from adapterkit.errors import AttachError, StateError
from adapterkit.handle.building import Built, parameters_of
from adapterkit.handle.concurrency import take_out
from adapterkit.handle.exports import export, unexport
from adapterkit.handle.facts import Facts
from adapterkit.handle.freezing import freeze, thaw
from adapterkit.handle.guarded_methods import guard, unguard
from adapterkit.handle.locks import Lock
from adapterkit.handle.places import Place, Places, place_of
from adapterkit.handle.refusals import refusal, spot_of
from adapterkit.handle.replaced_modules import Lookout, check_places
from adapterkit.handle.stand_ins import Original
from adapterkit.handle.ties import Ties
from adapterkit.handle.unused_parameters import Unreached
from adapterkit.mapping.model import MappedModel
from adapterkit.points import InjectionPoint, ParameterPoint

STATE = "_adapterkit_state"
"""Key under which every root component of an adapted model keeps its states."""


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

    @functools.cached_property
    def components(self) -> frozenset[str]:
        """The names of the models in which it acts."""
        return frozenset(point.component for point in self.points.values())

    def at(self, changed: Mapping[str, InjectionPoint]) -> Attached:
        """The same adapter, where some of its points are others now."""
        if not changed:
            return self
        parts = [dataclasses.replace(one, points=[changed.get(p.id, p) for p in one.points]) for one in self.parts]
        return dataclasses.replace(self, parts=parts, points={**self.points, **changed})

    @property
    def type_name(self) -> str:
        """What it is, for messages."""
        return " and ".join(type(config).__name__ for config in self.configs)


@dataclass
class Merge:
    """Weights that stand in for adapters, and the parameters that they replace."""

    selection: Selection
    originals: list[Original]
    ties: Ties


@dataclass
class State:
    """The adapters of one model or pipeline, and what must be restored when they go."""

    mapped: MappedModel
    switch: Switch = field(default_factory=Switch)
    adapters: dict[str, Attached] = field(default_factory=dict)
    merge: Merge | None = None
    trained: set[str] = field(default_factory=set)
    watched: dict[Place, list[RemovableHandle]] = field(default_factory=dict)
    lookouts: dict[str, list[RemovableHandle]] = field(default_factory=dict)
    places: Places = field(default_factory=Places)
    frozen: bool = False
    used: bool = False
    watches: Sequence[Any] = ()
    lock: Lock = field(default_factory=Lock)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=Lock())

    @property
    def roots(self) -> list[nn.Module]:
        """The models."""
        return self.mapped.roots

    def insert(
        self, name: str, parts: Sequence[Built], mapped: MappedModel, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Attaches built modules as one adapter, all of them or none. Its parts lie at points of their own.

        Args:
            name: What it is called.
            parts: One for each type in it.
            mapped: Where they lie: all models of this state, some of them, or more.
            metadata: What its file says.

        Raises:
            AttachError: A module cannot be adapted in place.
        """
        points = {point.id: point for part in parts for point in part.points}
        modules = {key: module for part in parts for key, module in part.modules.items()}
        reads = _side_inputs(parts)
        spots = [spot_of(mapped, point, modules[key]) for key, point in points.items()]
        refused = [(spot.point, refusal(spot, self.switch)) for spot in spots]
        problems = [f"{point.full_path}: {reason}" for point, reason in refused if reason]
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise AttachError(f"cannot attach {name!r}: {shown}")
        done: list[Spot] = []
        try:
            for spot in spots:
                done.append(spot)
                attach.attach(spot, name, self.switch)
        except BaseException:
            for spot in done:
                attach.detach(spot.module, spot.point, name, self.switch)
            raise
        for spot in spots:
            self.places.put(spot.point, spot.root, spot.module)
        self._grow(mapped)
        read = [p for p in points.values() if isinstance(p, ParameterPoint) and p.layout.access == "any"]
        self._watch(map(place_of, read))
        facts, parameters = Facts.of(points, modules), parameters_of(modules.values())
        held = _held(modules, parameters)
        self.adapters[name] = Attached(tuple(parts), points, modules, facts, dict(metadata or {}), held, reads)
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _grow(self, mapped: MappedModel) -> None:
        """Takes in the models of a handle, and lets them know of this state."""
        self.used = True
        components = {**self.mapped.components, **mapped.components}
        if len(components) > len(self.mapped.components):
            self.mapped = MappedModel(components, mapped.label, mapped.roles or self.mapped.roles)
        for name, component in self.mapped.models.items():
            if name not in self.lookouts:
                self.lookouts[name] = [
                    component.root.register_forward_pre_hook(Lookout(self)),
                    component.root.register_forward_hook(Unreached(self, name)),
                ]
                component.root.__dict__[STATE] = [*states_at(component.root), self]
                guard(component)
                export(self, component)

    def _watch(self, places: Iterable[Place]) -> None:
        """Tells the switch of calls that may read a weight: of the module that holds its layer, and of the model."""
        for key in {(name, path): None for name, at in places if at for path in ("", at.rpartition(".")[0])}:
            module = self.mapped.components[key[0]].root.get_submodule(key[1])
            self.watched[key] = self.watched.get(key) or [
                module.register_forward_pre_hook(self.switch.enter),
                module.register_forward_hook(self.switch.leave, always_call=True),
            ]

    def absorb(self, other: State) -> None:
        """Takes over what another state has, in models that this one has not.

        Raises:
            StateError: Weights are merged, or the other is in a block.
        """
        if self.merge is not None or other.merge is not None:
            raise StateError("weights are merged in a part of this pipeline; unmerge() that first")
        if other.switch.scopes.open():
            raise StateError("a part of this pipeline is in a block that says what acts there; leave it first")
        self.adapters |= other.adapters
        self.trained |= other.trained
        self.frozen |= other.frozen
        mine, theirs = self.switch.default, other.switch.default
        self.switch.default = Selection({**mine.weights, **theirs.weights}, {**mine.asked, **theirs.asked})
        self.places.take(other.places)
        for place in other.places:
            if (site := attach.site_of(other.places[place], other.switch)) is not None:
                site.switch = self.switch
                site.changed()
        watched = [*other.watched]
        other.leave(other.mapped.models)
        self._grow(other.mapped)
        self._watch(watched)

    def module(self, point: InjectionPoint) -> nn.Module:
        """The module that was adapted at a point."""
        return self.places[place_of(point)]

    def check(self, *, near: bool = False) -> None:
        """Looks whether every adapted module is where it was. One that has become larger is followed.

        Args:
            near: Whether to look at what is next to the model's root alone.

        Raises:
            ReplacedError: A module was replaced, and an adapter acts nowhere there.
        """
        if not (self.places.near() if near else self.places.same()):
            check_places(self)

    def discard(self, name: str, *, force: bool = False) -> list[str]:
        """Takes one adapter away; the last one leaves the model as it was found.

        Args:
            name: Which one.
            force: Whether to leave what another library has changed as it is.

        Returns:
            What was left.

        Raises:
            StateError: The class of a module was changed, and it is not to be left.
        """
        attached = self.adapters[name]
        points = list(attached.points.values())
        stuck = list({p.full_path: None for p in points if not attach.is_adapted(self.module(p))})
        if stuck and not force:
            more = f" (and of {len(stuck) - 1} more)" if len(stuck) > 1 else ""
            raise StateError(
                f"cannot detach {name!r}: the class of {stuck[0]}{more} was changed after attaching, by sharding or "
                "parametrizing; undo that first, or detach(force=True), which leaves that class as it is"
            )
        take_out(self, name)
        for point in points:
            attach.detach(self.module(point), point, name, self.switch)
        self.places.keep(place_of(p) for one in self.adapters.values() for p in one.points.values())
        self.trained.discard(name)
        if not self.adapters:
            self._restore_base()
        return stuck

    def train(self, names: Iterable[str]) -> None:
        """Lets these adapters, and nothing else, require grad. How the base was found is remembered the first time."""
        freeze(self.roots, again=self.frozen)
        self.frozen = True
        names = set(names)
        self.set_trainable(self.trained - names, value=False)
        self.set_trainable(names, value=True)
        self.tell_learning()

    def set_trainable(self, names: Iterable[str], *, value: bool) -> None:
        """Sets requires_grad of whole adapters, but for what their types hold."""
        for name in set(names):
            attached = self.adapters[name]
            for parameter in parameters_of(attached.modules.values()):
                if parameter.requires_grad != value:
                    parameter.requires_grad_(value)
            for point, keys in attached.held.items() if value else ():
                for key in keys:
                    attached.modules[point].get_parameter(key).requires_grad_(False)
            (self.trained.add if value else self.trained.discard)(name)

    def tell_learning(self) -> None:
        """Tells the switch whether anything trains. Plans that were made while nothing did remember not what acted."""
        before, self.switch.learning = self.switch.learning, bool(self.trained)
        if self.switch.learning and not before:
            for place in self.places:
                if (site := attach.site_of(self.places[place])) is not None:
                    site.changed()

    def leave(self, models: Iterable[str]) -> None:
        """Is no more about some of its models, in which nothing is adapted."""
        gone = set(models)
        for name in gone:
            for handle in self.lookouts.pop(name):
                handle.remove()
            root = self.mapped.components[name].root
            kept = [one for one in states_at(root) if one is not self]
            root.__dict__[STATE] = kept
            unexport(self, self.mapped.components[name])
            for one in kept[:1]:
                export(one, self.mapped.components[name])
            if not kept:
                del root.__dict__[STATE]
                unguard(self.mapped.components[name])
        for handle in (h for key in list(self.watched) if key[0] in gone for h in self.watched.pop(key)):
            handle.remove()
        if left := {name: one for name, one in self.mapped.components.items() if not gone & {name, one.model}}:
            self.mapped = MappedModel(left, self.mapped.label, self.mapped.roles)

    def _restore_base(self) -> None:
        if self.frozen:
            thaw(self.roots)
        self.frozen = False
        self.leave(self.lookouts)


def states_at(root: nn.Module) -> Sequence[State]:
    """The states of all handles that have put adapters into a model."""
    return root.__dict__.get(STATE, ())


def _held(modules: Mapping[str, AdapterModule], parameters: Iterable[nn.Parameter]) -> dict[str, frozenset[str]]:
    """Of modules as they were built: point id -> names of the parameters that do not require grad, where there are."""
    if False not in {parameter.requires_grad for parameter in parameters}:  # as almost always
        return {}
    holding = {key: one for key, one in modules.items() if not all(p.requires_grad for p in parameters_of([one]))}
    return {
        key: frozenset(name for name, parameter in one.named_parameters() if not parameter.requires_grad)
        for key, one in holding.items()
    }


def _side_inputs(parts: Sequence[Built]) -> frozenset[str]:
    """The names of what the types read as `base.context`."""
    with torch.device("meta"):
        return frozenset(name for part in parts for name in part.config.example_context(part.points, 1))
