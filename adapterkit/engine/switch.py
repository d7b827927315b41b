"""What acts, for every site of a model: one default, and blocks that say otherwise."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.engine.context import Context
from adapterkit.engine.scopes import Key, Scopes
from adapterkit.engine.selection import Selection
from adapterkit.errors import AttachError, StateError
from adapterkit.layouts import Repeats

NOTHING = Selection()
"""What acts where nothing does."""


class _Local(threading.local):
    """What the forward that runs in this thread keeps until it needs it."""

    def __init__(self) -> None:
        self.taps: dict[str, Tensor] = {}
        self.lengths: dict[str, tuple[int, int]] = {}
        self.calls: list[None] = []  # a list: torch.compile loses count of a number that is kept here


class Folded:
    """What is folded into the weights; while they are being changed, forwards wait for that."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.changing: threading.Event | None = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {"selection": self.selection, "changing": None}


class Switch:
    """Holds the selection, and the residual streams on their way to the sublayers' ends."""

    def __init__(self) -> None:
        self.default = Selection()
        self.folded: Folded | None = None
        self.scopes = Scopes()
        self.local = _Local()

    @property
    def current(self) -> Selection:
        """The selection that a forward here sees; nothing acts beside weights that are folded."""
        if self.folded is not None:
            return self._beside(self.folded)
        scopes = self.scopes
        # `scopes.view` without another call: every site of a forward asks
        view = scopes.view if torch.compiler.is_dynamo_compiling() else scopes.here.view
        own = view.selection
        return self.default if own is None else own

    def _beside(self, folded: Folded) -> Selection:
        if torch.compiler.is_dynamo_compiling():
            return NOTHING
        if folded.changing is not None:
            folded.changing.wait()
            return self.current
        own = self.scopes.view.selection
        if own is not None and own is not NOTHING and not own.equals(folded.selection):
            raise StateError(
                f"{own!r} was to act here, in what a block has started, but by now {folded.selection!r} is merged"
            )
        return NOTHING

    @contextlib.contextmanager
    def folding(self, selection: Selection, *, into: bool) -> Iterator[None]:
        """A block that changes weights, to those with the selection or from them. Forwards that begin in it wait."""
        before, folded = self.folded, Folded(selection)
        changing = folded.changing
        self.folded = folded
        try:
            yield
            self.folded = folded if into else None
        except BaseException:
            self.folded = before
            raise
        finally:
            folded.changing = None
            changing.set()

    @property
    def selected(self) -> bool:
        """Whether the caller is inside a block that selects."""
        return self.scopes.view.selection is not None

    def overridden(self, selection: Selection) -> contextlib.AbstractContextManager[Key | None]:
        """The caller's thread or task sees another selection inside the block."""
        return self.scopes.entered(selection)

    def given(self, context: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[Key | None]:
        """The caller has further side inputs inside the block, beside those of the blocks around it."""
        return self.scopes.entered(context=context)

    def recalled(self) -> contextlib.AbstractContextManager[Key | None]:
        """A block in which a thread sees what this one sees now: the selection and the side inputs."""
        return self.scopes.entered(self.current, self.scopes.view.context)

    def side(self, x: Tensor, at: str, repeats: Repeats | None = None) -> Context:
        """The side inputs as the adapters at a point see them, whose input is x."""
        return Context(self.scopes.view.context, x, at, repeats)

    def replace(self, selection: Selection) -> None:
        """Puts a selection in the place of what the caller sees."""
        if not self.scopes.replace(selection):
            self.default = selection

    def asked_by_blocks(self) -> list[Selection]:
        """What the blocks of all threads and tasks say."""
        return [scope.selection for scope in self.scopes.open() if scope.selection is not None]

    def forget(self, name: str) -> None:
        """Takes an adapter that is no more out of what acts."""
        self.default = self.default.without(frozenset({name}))
        self.scopes.lose(name)

    @property
    def inside(self) -> bool:
        """Whether this thread is inside the forward of a module that may read weights."""
        return bool(self.local.calls)

    def enter(self, *_: Any) -> None:
        """A forward pre-hook of such a module."""
        self.local.calls.append(None)

    def leave(self, *_: Any) -> None:
        """A forward hook of such a module. It may have been entered before it was watched."""
        if self.local.calls:
            self.local.calls.pop()

    def tap(self, key: str, x: Tensor) -> None:
        """Keeps the residual stream until the sublayer has run."""
        self.local.taps[key] = x

    def take(self, key: str) -> Tensor:
        """What was tapped last under this key."""
        taps = self.local.taps
        if key not in taps:
            raise AttachError(
                f"the sublayer at {key} ran without its residual stream; was it called outside its block?"
            )
        return taps.pop(key)

    def lengthened(self, key: str, length: int, added: int) -> None:
        """Keeps how long a sequence has become, and by how much."""
        self.local.lengths[key] = (length, added)

    def lengths(self, key: str) -> tuple[int, int]:
        """What was kept last under this key; nothing has length 0."""
        return self.local.lengths.get(key, (0, 0))

    def __getstate__(self) -> dict[str, Any]:
        return {"default": self.default, "folded": self.folded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.default, self.folded = state["default"], state["folded"]
        self.scopes, self.local = Scopes(), _Local()
