"""What every part of a handle needs: the model's state, and names in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from adapterkit.engine.scopes import Key
from adapterkit.engine.selection import Selection
from adapterkit.errors import ReplacedError, StateError
from adapterkit.handle import choices
from adapterkit.handle.choices import Choice
from adapterkit.handle.identity import known_as, mapped_as_found, state_of
from adapterkit.handle.locks import first_lock
from adapterkit.handle.state import Attached, State
from adapterkit.kernels.inference_mode import ordinary_tensors
from adapterkit.mapping.model import MappedModel
from adapterkit.plugins.matching import peel


class Access:
    """A model and the adapters on it. See `adapterkit.handle.adapters.Adapters` for the arguments."""

    def __init__(self, model: object, *, backend: str | None = None, roles: Mapping[str, str] | None = None) -> None:
        self._pipeline = None if isinstance(peel(model), nn.Module) else model
        self._options = (backend, roles)
        self._mapped = mapped_as_found(model, backend, roles)
        self._fresh = State(self._mapped)
        self._known: MappedModel | None = None

    @property
    def _state(self) -> State:
        if replaced := self._replaced():
            self._follow(replaced)
        found = state_of(self._mapped)
        if found is None:
            if self._fresh.used or self._fresh.mapped is not self._mapped:
                self._fresh = State(self._mapped)
            return self._fresh
        if found.mapped is not self._mapped and found.mapped is not self._known:
            self._mapped, self._known = known_as(self._mapped, found), found.mapped
        return found

    def _replaced(self) -> dict[str, nn.Module]:
        """The components that are other models now in the pipeline which the handle is on. One that is None is none."""
        if self._pipeline is None:
            return {}
        found: dict[str, nn.Module] = {}
        for name, component in self._mapped.models.items():
            now = getattr(self._pipeline, name, None)
            if now is not component.root and isinstance(now, nn.Module) and peel(now) is not component.root:
                found[name] = now
        return found

    def _follow(self, replaced: Mapping[str, nn.Module]) -> None:
        """The handle is about the models that are in the pipeline now, where no adapter is in those that were."""
        state = state_of(self._mapped)
        if state is not None:
            if not replaced.keys().isdisjoint(component for component, _ in state.places):
                return
            state.leave([name for name in replaced if name in state.lookouts])
        self._mapped = mapped_as_found(self._pipeline, *self._options)

    def _check(self, *, near: bool = False) -> None:
        """Looks whether what was adapted is where it was: `near` the top alone, where a walk would cost too much.

        Raises:
            ReplacedError: It is not.
        """
        state = self._state
        if replaced := self._replaced():
            name = next(iter(replaced))
            users = ", ".join(repr(n) for n, one in state.adapters.items() if name in one.components)
            raise ReplacedError(
                f"the {name} of the {self._mapped.label} is another model now, and {users} acts in the one that was; "
                "put that back; or take the adapter off with remove() or detach(), and add it again"
            )
        state.check(near=near)

    def _mapped_for(self, attached: Attached) -> MappedModel:
        """Where an adapter lies: it may have been added by a handle on more models than this one's."""
        components = self._mapped.components
        return self._mapped if all(name in components for name in attached.components) else self._state.mapped

    def _attached(self, name: str) -> Attached:
        choices.check_names([name], self._state.adapters)
        return self._state.adapters[name]

    def _selection(self, choice: Choice) -> Selection:
        return choices.to_selection(choice, self._state.adapters)

    def _require_outside(self, what: str) -> None:
        if self._state.switch.selected:
            raise StateError(
                f"{what} sets what acts outside of `activated`, `disabled` and `routed`: inside such a block it would "
                "change nothing; leave it first"
            )

    def _require_unmerged(self, what: str) -> None:
        switch = self._state.switch
        if not torch.compiler.is_dynamo_compiling():
            switch.wait()
        if switch.folded is not None:
            raise StateError(f"cannot {what} while {', '.join(map(repr, switch.folded))} is merged; unmerge() first")

    @contextlib.contextmanager
    def _changing(self) -> Iterator[State]:
        """The state, which no other thread changes; tensors that are made are ordinary ones."""
        with ordinary_tensors():
            while True:
                state = self._state
                with first_lock() if state is self._fresh else contextlib.nullcontext(), state.lock:
                    if self._state is state:
                        yield state
                        return

    @contextlib.contextmanager
    def _block(self, selection: Selection, what: str) -> Iterator[Key | None]:
        """The caller's block, in which this selection acts."""
        state = self._state
        with state.switch.overridden(selection) as key:
            # Who merges or removes looks at the blocks after it has begun: one of the two sees the other.
            self._require_unmerged(what)
            choices.check_names(selection.names, state.adapters)
            yield key
