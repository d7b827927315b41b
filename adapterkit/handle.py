"""The handle on one model: name -> adapter."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterkit import building, choices, exchange, merging
from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.checkpoint import Checkpoint, Format
from adapterkit.choices import Choice
from adapterkit.compose import Selection
from adapterkit.errors import ConfigError, StateError
from adapterkit.plugins import get_plugin_manager
from adapterkit.points import Points
from adapterkit.reports import AdapterReport, LoadReport, Report
from adapterkit.selectors import Selector
from adapterkit.state import Attached, State, mapped_as_found, state_of


class Adapters:
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

    def __init__(self, model: object, *, backend: str | None = None, roles: Mapping[str, str] | None = None) -> None:
        self._mapped = mapped_as_found(model, backend, roles)
        self._fresh = State(self._mapped)

    @property
    def _state(self) -> State:
        return state_of(self._mapped) or self._fresh

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
            StateError: Weights are merged.
        """
        state = self._state
        with state.lock:
            self._require_unmerged("add an adapter")
            building.check_name(name, state.adapters)
            if not isinstance(config, AdapterConfig):
                raise ConfigError([f"expected an AdapterConfig such as LoRA(rank=8), not {config!r}"], "add()")
            if problems := building.option_problems(seed, dtype):
                raise ConfigError(problems, "add()")
            state.insert(name, building.build_new(config, self._mapped, seed, dtype))
            self.activate(name)
            self.train(name)
        return self._report(name)

    def load(
        self, path: str | os.PathLike[str], name: str | None = None, *, format: str | None = None, strict: bool = True
    ) -> LoadReport:
        """Reads an adapter from a file. It neither acts nor trains until it is told to.

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
        checkpoint = exchange.find_format(path, format).read(path, self.points())
        return self.install(name, checkpoint, strict=strict, source=path)

    def install(self, name: str, checkpoint: Checkpoint, *, strict: bool = True, source: object = None) -> LoadReport:
        """Attaches an adapter that is already in memory; what `load` does after reading. Errors name `source`."""
        state = self._state
        with state.lock:
            building.check_name(name, state.adapters)
            built, notes = building.build_loaded(checkpoint, self._mapped, strict=strict, source=source)
            state.insert(name, built)
        count = sum(p.numel() for m in built.modules.values() for p in m.parameters())
        return LoadReport(name, checkpoint.type, [p.id for p in built.points], count, notes)

    def save(self, name: str, path: str | os.PathLike[str], *, format: str = "native") -> Path:
        """Writes one adapter to a file, atomically: whatever happens, the path holds the old file or the new.

        Raises:
            UnknownNameError: There is no such adapter or format.
            CheckpointError: The format cannot express the adapter, or the place cannot be written.
        """
        path = Path(path)
        writer: Format = get_plugin_manager().format(format).load()()
        writer.write(self.checkpoint(name), path, self.points())
        return path

    def checkpoint(self, name: str) -> Checkpoint:
        """One adapter with all that a file must know of it; the tensors are copies on the CPU.

        Raises:
            PluginError: The adapter's type is not registered, so no file could name it.
        """
        return exchange.to_checkpoint(self._attached(name), self._mapped)

    def remove(self, name: str) -> None:
        """Takes an adapter off the model. The last one leaves the model bit for bit as it was found.

        Raises:
            StateError: It is merged into the weights.
        """
        state = self._state
        with state.lock:
            self._attached(name)
            if state.merge is not None and name in state.merge.selection.weights:
                raise StateError(f"{name!r} is merged into the weights; unmerge() before removing it")
            if state.merge is not None:
                state.merge.before = state.merge.before.without(frozenset({name}))
            state.discard(name)
            if not state.adapters:
                self._fresh = State(self._mapped)

    def detach(self) -> None:
        """Takes every adapter off: the model is bit for bit what it was. Merged weights are unmerged first."""
        state = self._state
        with state.lock:
            if state.merge is not None:
                merging.unmerge(state)
            for name in list(state.adapters):
                self.remove(name)

    # -- what acts --------------------------------------------------------------------------------------------------

    @property
    def active(self) -> dict[str, float | list[float]]:
        """Name -> weight of what acts now, in this thread; inside `routed` one weight for each row."""
        state = self._state
        weights = (state.merge.selection if state.merge else state.switch.current).weights
        return {name: weight.tolist() if isinstance(weight, Tensor) else weight for name, weight in weights.items()}

    def activate(self, choice: Choice) -> None:
        """Sets what acts from now on: a name, names, `{name: weight}`, or nothing (None).

        Raises:
            UnknownNameError: No such adapter.
            ConfigError: A weight is not a finite number, or negative where it multiplies attention.
            StateError: Weights are merged.
        """
        self._require_unmerged("change what acts")
        selection = self._selection(choice)
        self._state.switch.default = selection

    @contextlib.contextmanager
    def activated(self, choice: Choice) -> Iterator[None]:
        """Sets what acts in this thread inside a `with` block. Blocks nest; other threads see nothing of it."""
        self._require_unmerged("change what acts")
        with self._state.switch.overridden(self._selection(choice)):
            yield

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Exactly the base model, in this thread, inside a `with` block."""
        return self.activated(None)

    @contextlib.contextmanager
    def routed(self, routes: Sequence[str | None]) -> Iterator[None]:
        """Gives every sample of a batch its own adapter, in this thread, inside a `with` block. Also in training.

        Args:
            routes: One name for each row of the batch; None is the base.

        Raises:
            UnknownNameError: No such adapter.
            RoutingError: An adapter acts where one weight serves the whole batch; or, in a forward, the model's batch
                has another number of rows.
            StateError: Weights are merged.
        """
        self._require_unmerged("route samples")
        with self._state.switch.overridden(choices.to_routes(routes, self._state.adapters)):
            yield

    def checkpoint_context(
        self,
    ) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """A `context_fn` for `torch.utils.checkpoint`: what is recomputed sees what acted in the first forward.

        Needed where the backward runs outside of the `activated` block of its forward:
        `model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": adapters.checkpoint_context})`.
        """
        switch = self._state.switch
        return contextlib.nullcontext(), switch.overridden(switch.current)

    # -- what trains ------------------------------------------------------------------------------------------------

    def train(self, *names: str) -> None:
        """Makes these adapters, and nothing else on the model, require grad."""
        choices.check_names(names, self._state.adapters)
        if not names:
            raise ConfigError(["name the adapters that should train; freeze() stops all"], "train()")
        self._state.train(names)

    def freeze(self, *names: str) -> None:
        """Makes these adapters not require grad; all of them where none is named. The base is left alone."""
        choices.check_names(names, self._state.adapters)
        self._state.set_trainable(names or self._state.adapters, value=False)

    def parameters(self, *names: str) -> Iterator[nn.Parameter]:
        """The parameters of these adapters; of all where none is named."""
        choices.check_names(names, self._state.adapters)
        for name in names or list(self._state.adapters):
            for module in self._state.adapters[name].modules.values():
                yield from module.parameters()

    # -- merging ----------------------------------------------------------------------------------------------------

    def merge(self, choice: Choice = None) -> None:
        """Folds adapters into the weights: the same output at the base's speed.

        Args:
            choice: What to fold, as for `activate`; by default what acts now. Nothing else acts while it is merged.

        Raises:
            NotMergeableError: An adapter has no equivalent weight. Nothing is changed.
            StateError: Weights are merged already, or nothing acts.
        """
        state = self._state
        with state.lock:
            self._require_unmerged("merge again")
            selection = state.switch.current if choice is None else self._selection(choice)
            if selection.routed:
                raise StateError("samples are routed here, and one weight cannot be several; name an adapter")
            if not selection:
                raise StateError("nothing acts, so there is nothing to merge; name an adapter")
            merging.merge(state, selection)

    def unmerge(self) -> None:
        """Gives back the very bits of the weights, and what acted before.

        Raises:
            StateError: Nothing is merged.
        """
        state = self._state
        with state.lock:
            if state.merge is None:
                raise StateError("nothing is merged")
            merging.unmerge(state)

    @contextlib.contextmanager
    def merged(self, choice: Choice = None) -> Iterator[None]:
        """Merges inside a `with` block."""
        self.merge(choice)
        try:
            yield
        finally:
            self.unmerge()

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
        """`point id/parameter` -> tensor (not a copy)."""
        modules = self.modules(name)
        return {
            f"{key}/{part}": tensor for key, module in modules.items() for part, tensor in module.state_dict().items()
        }

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
            merged=state.merge is not None and name in state.merge.selection.weights,
        )

    def __contains__(self, name: object) -> bool:
        return name in self._state.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._state.adapters))

    def __len__(self) -> int:
        return len(self._state.adapters)

    def __repr__(self) -> str:
        return f"Adapters({self._mapped.label}: {', '.join(self) or 'none'})"

    # -- inside -----------------------------------------------------------------------------------------------------

    def _attached(self, name: str) -> Attached:
        choices.check_names([name], self._state.adapters)
        return self._state.adapters[name]

    def _selection(self, choice: Choice) -> Selection:
        return choices.to_selection(choice, self._state.adapters)

    def _require_unmerged(self, what: str) -> None:
        merge = self._state.merge
        if merge is not None:
            raise StateError(f"cannot {what} while {', '.join(map(repr, merge.selection))} is merged; unmerge() first")
