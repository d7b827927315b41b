"""The handle on one model: name -> adapter."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.engine.attach import sites_of
from adapterkit.errors import ConfigError, StateError, UnregisteredTypeWarning, shown
from adapterkit.handle import building, choices, saving
from adapterkit.handle.acting import Switching
from adapterkit.handle.exchange import Exchange
from adapterkit.handle.freezing import base_parameters
from adapterkit.handle.initialising import initialise, without_values
from adapterkit.handle.reports import AdapterReport, Report
from adapterkit.handle.training import Learning
from adapterkit.handle.view import seen
from adapterkit.mapping.structure import base_modules
from adapterkit.plugins import get_plugin_manager
from adapterkit.points import Points
from adapterkit.selectors import Selector


class Adapters(Switching, Learning, Exchange):
    """Adds, switches, merges, saves and removes the adapters of one model.

    Args:
        model: A torch module or a diffusers pipeline. Nothing is changed until an adapter is added. A model that
            already has adapters gives a handle on the same state.
        backend: A backend's name, to override the match by class.
        roles: See `points`.

    Raises:
        UnsupportedModelError: No backend knows the model.
        AttachError: Another library has replaced modules in the model.
    """

    # -- in and out -------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        config: AdapterConfig | Sequence[AdapterConfig],
        *,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        activate: bool = True,
        train: bool = True,
    ) -> AdapterReport:
        """Builds an adapter, attaches it, makes it the one that acts and the one that trains, and freezes the base.

        After a second `add` the first adapter is there, but neither acts nor trains: say `activate(["a", "b"])` and
        `train("a", "b")` for both, or leave the first as it is with `activate=False, train=False`.

        Args:
            name: 1 to 64 letters, digits, `_` or `-`.
            config: What to add; of several types, a config each, at points of their own.
            settings: Point id -> what is other there than in the config, such as `{"rank": 4}`; {} for nothing. They
                are the points, and the config's `targets` are not read: for data. `AdapterConfig.settings` is the same.
            seed: Of the initial values. No global random number is consumed.
            dtype: Of the parameters; by default the base's, but at least float32.
            activate: Whether it acts, and nothing else does; otherwise what acts stays.
            train: Whether it trains, and nothing else does; otherwise what requires grad stays, and it requires none.

        Warns:
            UnregisteredTypeWarning: The type has no name in any plug-in, so the adapter cannot be saved.

        Raises:
            InvalidNameError: The name is malformed or taken.
            TargetNotFoundError, IncompatibleTargetError: The config's targets do not fit the model.
            StateError: Weights are merged, or this is inside an `activated` block, where it would not act; or the model
                was made in `torch.inference_mode()`, where it could not train.
        """
        with self._changing() as state:
            self._check()
            self._require_unmerged("add an adapter")
            if activate:
                self._require_outside("add()")
            building.check_name(name, state.adapters)
            configs = _configs(config, settings)
            if problems := building.option_problems(seed, dtype, activate=activate, train=train):
                raise ConfigError(problems, "add()")
            built = [building.build_new(one, self._mapped, seed, dtype) for one in configs]
            _check_apart(built)
            self._check_parts(built)
            if train:
                self._require_trainable()
            state.insert(name, built, self._mapped)
            if activate:
                self.activate(name)
            if train:
                self.train(name)
        if reason := next(filter(None, map(saving.unsavable, configs)), None):
            warnings.warn(f"{name!r} cannot be saved: {reason}", UnregisteredTypeWarning, stacklevel=2)
        return self._report(name)

    def initialise(self, *names: str) -> None:
        """Gives adapters the values that `add` gives them on a model that has some: the same bits, by the same seed.

        For a model that was adapted on the meta device: after `model.to_empty(device=...)`, and after the base has its
        values, from which some types start.

        Args:
            names: Which ones; where none is named, those that have no values.

        Raises:
            UnknownNameError: There is no such adapter.
            StateError: An adapter was read from a file (see `load_into`), or the model is on the meta device.
        """
        with self._changing() as state:
            choices.check_names(names, state.adapters)
            for name in names or [name for name, one in state.adapters.items() if without_values(one)]:
                initialise(name, state.adapters[name], state.mapped)

    # -- looking ----------------------------------------------------------------------------------------------------

    def points(self, selector: str | None = None) -> Points:
        """The model's injection points, with the model as formats see it."""
        found = seen(self._mapped)
        if selector is None or found.model is None:
            return found
        return Points(Selector(selector).select(found, self._mapped.label)).of(found.model)

    def config(self, name: str) -> AdapterConfig:
        """What was asked for under this name.

        Raises:
            StateError: It was read from a file of several types; see `configs`.
        """
        found = self.configs(name)
        if len(found) > 1:
            types = ", ".join(type(one).__name__ for one in found)
            raise StateError(f"{name!r} is of several types ({types}); configs({name!r}) gives them all")
        return found[0]

    def configs(self, name: str) -> list[AdapterConfig]:
        """What was asked for under this name, of each type in it: a file may hold several, at points of their own."""
        return self._attached(name).configs

    def modules(self, name: str) -> dict[str, AdapterModule]:
        """Point id -> the adapter's module there."""
        return dict(self._attached(name).modules)

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """`point id/parameter` -> tensor (not a copy); `shared/parameter` for what all points share.

        Of an adapter of several types, `shared.1/parameter` is what those of the second share, and so on.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for place, part in enumerate(self._attached(name).parts):
            if (shared := building.shared_of(part.modules)) is not None:
                states[f"{building.SHARED}.{place}" if place else building.SHARED] = shared.state_dict()
            states |= {key: building.own_state(module) for key, module in part.modules.items()}
        return {f"{key}/{part}": tensor for key, state in states.items() for part, tensor in state.items()}

    def report(self) -> Report:
        """What is on the model. Prints as a table.

        Raises:
            ReplacedError: A module was replaced, and an adapter acts nowhere there.
        """
        self._check()
        state = self._state
        roots = self._mapped.roots
        base = list(base_parameters(roots))
        adapters = [self._report(name) for name in state.adapters]
        trainable = sum(p.numel() for p in [*base, *self.parameters()] if p.requires_grad)
        beside = sum(any(s.switch is not state.switch for s in sites_of(one)) for one in base_modules(roots))
        return Report(self._mapped.label, sum(p.numel() for p in base), trainable, adapters, beside)

    def _report(self, name: str) -> AdapterReport:
        state, attached = self._state, self._attached(name)
        specs = [(get_plugin_manager().spec_of(type(config)), config) for config in attached.configs]
        weights = list(self.parameters(name))
        return AdapterReport(
            name=name,
            type=" + ".join(spec.name if spec else type(config).__name__ for spec, config in specs),
            points=dict(collections.Counter(point.role for point in attached.points.values())),
            parameters=sum(p.numel() for p in weights),
            bytes=sum(p.numel() * p.element_size() for p in weights),
            weight=self.active.get(name),
            trainable=any(p.requires_grad for p in weights),
            merged=state.merge is not None and name in state.merge.selection.names,
        )

    def __contains__(self, name: object) -> bool:
        return name in self._state.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._state.adapters))

    def __len__(self) -> int:
        return len(self._state.adapters)

    def __repr__(self) -> str:
        return f"Adapters({self._mapped.label}: {', '.join(self) or 'none'})"


def _configs(
    given: AdapterConfig | Sequence[AdapterConfig], settings: Mapping[str, Mapping[str, Any]] | None
) -> list[AdapterConfig]:
    """One config, with settings where there are any, or several."""
    found: list[Any] = [given] if not isinstance(given, (list, tuple)) else list(given)
    if not found or not all(isinstance(one, AdapterConfig) for one in found):
        raise ConfigError([f"expected an AdapterConfig such as LoRA(rank=8), not {shown(given)}"], "add()")
    if settings is None:
        return found
    if len(found) > 1:
        raise ConfigError(["settings are of one config; give each of several its own"], "add()")
    return [dataclasses.replace(found[0], settings=settings)]


def _check_apart(built: Sequence[building.Built]) -> None:
    """Refuses a point that two types of one adapter would act at."""
    owners: dict[str, str] = {}
    for part in built:
        for point in part.points:
            if point.id in owners:
                told = f"{owners[point.id]} and {type(part.config).__name__} both are for {point.id}"
                raise ConfigError([f"{told}; types of one adapter have points of their own: narrow targets"], "add()")
            owners[point.id] = type(part.config).__name__
