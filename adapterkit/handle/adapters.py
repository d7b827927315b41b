"""The handle on one model: name -> adapter."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import ConfigError, StateError
from adapterkit.formats import registry
from adapterkit.handle import building, loading, merging, saving
from adapterkit.handle.acting import Switching
from adapterkit.handle.reports import AdapterReport, LoadReport, Report
from adapterkit.handle.state import State
from adapterkit.handle.training import Learning
from adapterkit.mapping import targets
from adapterkit.plugins import get_plugin_manager
from adapterkit.points import Points
from adapterkit.selectors import Selector


class Adapters(Switching, Learning):
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
        self, name: str, config: AdapterConfig, *, seed: int = 0, dtype: torch.dtype | None = None
    ) -> AdapterReport:
        """Builds an adapter, attaches it, makes it the one that acts and the one that trains, and freezes the base.

        Args:
            name: 1 to 64 letters, digits, `_` or `-`.
            config: What to add.
            seed: Of the initial values. No global random number is consumed.
            dtype: Of the parameters; by default the base's, but at least float32.

        Raises:
            InvalidNameError: The name is malformed or taken.
            TargetNotFoundError, IncompatibleTargetError: The config's targets do not fit the model.
            StateError: Weights are merged, or this is inside an `activated` block, where it would not act.
        """
        state = self._state
        with state.lock:
            self._require_unmerged("add an adapter")
            self._require_outside("add()")
            building.check_name(name, state.adapters)
            if not isinstance(config, AdapterConfig):
                raise ConfigError([f"expected an AdapterConfig such as LoRA(rank=8), not {config!r}"], "add()")
            if problems := building.option_problems(seed, dtype):
                raise ConfigError(problems, "add()")
            built = building.build_new(config, self._mapped, seed, dtype)
            self._check_parts(built)
            state.insert(name, built)
            self.activate(name)
            self.train(name)
        return self._report(name)

    def load(
        self, path: str | os.PathLike[str], name: str | None = None, *, format: str | None = None, strict: bool = True
    ) -> LoadReport:
        """Reads an adapter from a file. It neither acts nor trains until it is told to, and freezes nothing.

        Args:
            path: The file.
            name: By default the file's name without its ending.
            format: A format's name; by default the file's content tells.
            strict: Whether everything in the file must fit this model.

        Raises:
            CheckpointError: The file is damaged, foreign or for another base. The model is left as it was.
        """
        path = Path(path)
        name = building.check_name(path.stem if name is None else name, self._state.adapters)
        checkpoint = registry.find_format(path, format).read(path, self.points())
        return self.install(name, checkpoint, strict=strict, source=path)

    def install(self, name: str, checkpoint: Checkpoint, *, strict: bool = True, source: object = None) -> LoadReport:
        """Attaches an adapter that is already in memory; what `load` does after reading. Errors name `source`."""
        state = self._state
        with state.lock:
            building.check_name(name, state.adapters)
            built, notes = loading.build_loaded(checkpoint, self._mapped, strict=strict, source=source)
            self._check_parts(built)
            state.insert(name, built)
        count = sum(p.numel() for p in building.parameters_of(built.modules.values()))
        return LoadReport(name, checkpoint.type, [p.id for p in built.points], count, notes)

    def load_all(
        self, path: str | os.PathLike[str], *, format: str | None = None, strict: bool = True
    ) -> dict[str, LoadReport]:
        """Reads every adapter of a file under the name that it has there: all of them, or none.

        A file of one adapter gives it the file's name. Arguments and errors as for `load`.
        """
        path, state = Path(path), self._state
        found = registry.find_format(path, format).read_many(path, self.points())
        named = {name or path.stem: checkpoint for name, checkpoint in found.items()}
        with state.lock:
            for name in named:
                building.check_name(name, state.adapters)
            reports: dict[str, LoadReport] = {}
            try:
                for name, checkpoint in named.items():
                    reports[name] = self.install(name, checkpoint, strict=strict, source=path)
            except BaseException:
                for name in reversed(reports):
                    self.remove(name)
                raise
        return reports

    def save(self, names: str | Sequence[str], path: str | os.PathLike[str], *, format: str = "native") -> Path:
        """Writes adapters to a file, atomically: whatever happens, the path holds the old file or the new.

        Several adapters, whatever their types, go into one file, which `load_all` reads. An adapter that combines
        others takes them along.

        Args:
            names: One name, or several.
            path: The file.
            format: A format's name; not every format holds several.

        Raises:
            UnknownNameError: There is no such adapter or format.
            CheckpointError: The format cannot express the adapter, or the place cannot be written.
        """
        path = Path(path)
        writer = registry.find_format(path, format)
        checkpoints = {
            name: self.checkpoint(name) for name in self._with_parts([names] if isinstance(names, str) else names)
        }
        if len(checkpoints) == 1 and isinstance(names, str):
            writer.write(checkpoints[names], path, self.points())
        else:
            writer.write_many(checkpoints, path, self.points())
        return path

    def _check_parts(self, built: building.Built) -> None:
        here: dict[str, set[str]] = {}
        for key, module in built.modules.items():
            for part in module.parts:
                here.setdefault(part, set()).add(key)
        attached = {name: one.points for name, one in self._state.adapters.items()}
        targets.check_parts(here, attached, type(built.config).__name__)

    def _with_parts(self, names: Sequence[str]) -> list[str]:
        """The names, each after those that its adapter combines."""
        if not names:
            raise ConfigError(["name at least one adapter"], "save()")
        found: dict[str, None] = {}
        for name in names:
            modules = self._attached(name).modules.values()
            parts = dict.fromkeys(part for module in modules for part in module.parts)
            found |= dict.fromkeys([*(self._with_parts(list(parts)) if parts else ()), name])
        return list(found)

    def checkpoint(self, name: str) -> Checkpoint:
        """One adapter with all that a file must know of it; the tensors are copies on the CPU.

        Raises:
            PluginError: The adapter's type is not registered, so no file could name it.
        """
        return saving.to_checkpoint(self._attached(name), self._mapped)

    def remove(self, name: str) -> None:
        """Takes an adapter off the model. The last one leaves the model bit for bit as it was found.

        Raises:
            StateError: It is merged into the weights.
        """
        state = self._state
        with state.lock:
            self._attached(name)
            if state.merge is not None and name in state.merge.selection.names:
                raise StateError(f"{name!r} is merged into the weights; unmerge() before removing it")
            if users := self._users_of(name):
                raise StateError(f"{users[0]!r} combines {name!r}; remove({users[0]!r}) first")
            state.discard(name)
            if not state.adapters:
                self._fresh = State(self._mapped)

    def detach(self) -> None:
        """Takes every adapter off: the model is bit for bit what it was. Merged weights are unmerged first."""
        state = self._state
        with state.lock:
            if state.merge is not None:
                merging.unmerge(state)
            for name in reversed(list(state.adapters)):  # what combines others came after them
                self.remove(name)

    # -- looking ----------------------------------------------------------------------------------------------------

    def points(self, selector: str | None = None) -> Points:
        """The model's injection points."""
        found = self._mapped.points()
        return found if selector is None else Points(Selector(selector).select(found, self._mapped.label))

    def config(self, name: str) -> AdapterConfig:
        """What was asked for under this name."""
        return self._attached(name).config

    def modules(self, name: str) -> dict[str, AdapterModule]:
        """Point id -> the adapter's module there."""
        return dict(self._attached(name).modules)

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """`point id/parameter` -> tensor (not a copy); `shared/parameter` for what all points share."""
        modules = self.modules(name)
        shared = building.shared_of(modules)
        states = {} if shared is None else {building.SHARED: shared.state_dict()}
        states |= {key: building.own_state(module) for key, module in modules.items()}
        return {f"{key}/{part}": tensor for key, state in states.items() for part, tensor in state.items()}

    def report(self) -> Report:
        """What is on the model. Prints as a table."""
        state = self._state
        base = [parameter for _, parameter in state.base_parameters()]
        adapters = [self._report(name) for name in state.adapters]
        trainable = sum(p.numel() for p in [*base, *self.parameters()] if p.requires_grad)
        return Report(self._mapped.label, sum(p.numel() for p in base), trainable, adapters)

    def _report(self, name: str) -> AdapterReport:
        state, attached = self._state, self._attached(name)
        spec = get_plugin_manager().spec_of(type(attached.config))
        weights = list(self.parameters(name))
        return AdapterReport(
            name=name,
            type=spec.name if spec else type(attached.config).__name__,
            points=dict(collections.Counter(point.role for point in attached.points.values())),
            parameters=sum(p.numel() for p in weights),
            bytes=sum(p.numel() * p.element_size() for p in weights),
            weight=self.active.get(name),
            trainable=bool(weights) and all(p.requires_grad for p in weights),
            merged=state.merge is not None and name in state.merge.selection.names,
        )

    def _users_of(self, name: str) -> list[str]:
        """The adapters that combine this one."""
        every = self._state.adapters.items()
        return [user for user, one in every if any(name in module.parts for module in one.modules.values())]

    def __contains__(self, name: object) -> bool:
        return name in self._state.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._state.adapters))

    def __len__(self) -> int:
        return len(self._state.adapters)

    def __repr__(self) -> str:
        return f"Adapters({self._mapped.label}: {', '.join(self) or 'none'})"
