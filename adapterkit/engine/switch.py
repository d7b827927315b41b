"""What acts, for every site of a model: one default, and blocks that say otherwise."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from adapterkit.contract.layouts import Repeats
from adapterkit.engine.context import Context
from adapterkit.engine.scopes import Key, Scopes
from adapterkit.engine.selection import Selection
from adapterkit.errors import AttachError, StateError

NOTHING = Selection()
"""What acts where nothing does."""


class _Local(threading.local):
    """What the forward that runs in this thread keeps until it needs it."""

    def __init__(self) -> None:
        self.taps: dict[str, Tensor] = {}
        self.lengths: dict[str, tuple[int, int]] = {}
        self.calls: list[None] = []  # a list: torch.compile loses count of a number that is kept here


class _Gate:
    """Calls that begin wait here while one thread changes what they would see."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.opened = threading.Event()


class Switch:
    """Holds the selection, and the residual streams on their way to the sublayers' ends.

    Attributes:
        exchanging: Whether hooks put other data into the model's parameters after each call.
    """

    def __init__(self) -> None:
        self.default = Selection()
        self.folded: Selection | None = None
        self.gate: _Gate | None = None
        self.plain = True
        self.switched = self.learning = False
        self.exchanging = False
        self.scopes = Scopes()
        self.local = _Local()

    @property
    def current(self) -> Selection:
        """The selection that a forward here sees; nothing acts beside weights that are folded."""
        if not self.plain:
            return self._beside()
        scopes = self.scopes
        if is_dynamo_compiling():
            own = scopes.view.selection
        elif not scopes.views:  # the usual case, and quick: every site of a forward asks
            return self.default
        else:
            own = scopes.here.view.selection
        return self.default if own is None else own

    def _beside(self) -> Selection:
        if self.gate is not None and not is_dynamo_compiling():
            self.wait()
        own = self.scopes.view.selection
        if self.folded is None:
            return self.default if own is None else own
        if own is None or own is NOTHING or own.equals(self.folded):
            return NOTHING
        if is_dynamo_compiling():
            raise StateError(
                f"{self.folded!r} was merged in a block of {own!r}, which no compiled model can tell apart"
            )
        return own.on_unmerged()

    def fold(self, selection: Selection | None) -> None:
        """Says what is in the weights."""
        self.folded = selection
        self.plain = selection is None and self.gate is None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A block in which calls of other threads that begin wait for its end. Blocks of one thread nest."""
        if self.gate is not None and self.gate.thread == threading.get_ident():
            yield
            return
        gate = self.gate = _Gate()
        self.plain = False
        try:
            yield
        finally:
            self.gate = None
            self.plain = self.folded is None
            gate.opened.set()

    def wait(self) -> None:
        """Returns when no other thread changes what a call would see."""
        gate = self.gate
        if gate is not None and gate.thread != threading.get_ident():
            gate.opened.wait()

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

    def recalls(self, selection: Selection) -> bool:
        """Whether something else may act in a backward: something trains, and this is a block's or one of several."""
        return self.learning and (self.switched or selection is not self.default)

    def side(self, x: Tensor, at: str, repeats: Repeats | None = None) -> Context:
        """The side inputs as the adapters at a point see them, whose input is x."""
        return Context(self.scopes.view.context, x, at, repeats)

    def is_in(self, key: Key | None) -> bool:
        """Whether the caller is inside a block, or was started there."""
        return any(scope.key is key for scope in self.scopes.view.scopes)

    def replace(self, selection: Selection) -> None:
        """Puts a selection in the place of what the caller sees."""
        if not self.scopes.replace(selection):
            self.default = selection

    def in_blocks(self, *, of_others: bool = False) -> list[Selection]:
        """What the blocks of all threads and tasks say, or of all but the caller's."""
        open_ones = self.scopes.open(of_others=of_others)
        return [scope.selection for scope in open_ones if scope.selection is not None]

    @property
    def names(self) -> frozenset[str]:
        """Every adapter that somebody has chosen, in any thread or task."""
        return frozenset(name for selection in (self.default, *self.in_blocks()) for name in selection.names)

    def forget(self, name: str) -> None:
        """Takes an adapter that is no more out of what acts."""
        self.default = self.default.without(frozenset({name}))
        self.scopes.forget(name)

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

    def take(self, key: str, output: Tensor) -> Tensor:
        """What was tapped last under this key.

        A sublayer may be called chunk by chunk (diffusers' `set_chunk_feed_forward`): the next part, then.

        Args:
            key: Of the point.
            output: What the sublayer gave.
        """
        taps = self.local.taps
        if key not in taps:
            raise AttachError(
                f"the sublayer at {key} ran without its residual stream; was it called outside its block?"
            )
        x = taps.pop(key)
        axis = _cut_axis(x.shape, output.shape)
        if axis is None:
            return x
        done = output.shape[axis]
        taps[key] = x.narrow(axis, done, x.shape[axis] - done)
        return x.narrow(axis, 0, done)

    def keep(self, key: str, x: Tensor | None) -> None:
        """Keeps what a module is called with, for this thread; None lets go of it."""
        if x is None:
            self.local.taps.pop(key, None)
        else:
            self.local.taps[key] = x

    def kept(self, key: str) -> Tensor:
        """What is kept under this key now."""
        return self.local.taps[key]

    def lengthened(self, key: str, length: int, added: int) -> None:
        """Keeps how long a sequence has become, and by how much."""
        self.local.lengths[key] = (length, added)

    def lengths(self, key: str) -> tuple[int, int]:
        """What was kept last under this key; nothing has length 0."""
        return self.local.lengths.get(key, (0, 0))

    def __getstate__(self) -> dict[str, Any]:
        return {"default": self.default, "folded": self.folded, "exchanging": self.exchanging}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.default, self.exchanging = state["default"], state["exchanging"]
        self.fold(state["folded"])


def _cut_axis(whole: torch.Size, part: torch.Size) -> int | None:
    """The one axis but the features' along which a tensor is shorter than another; None where it is no part of it."""
    if whole == part or len(whole) != len(part):
        return None
    differing = [axis for axis, (size, other) in enumerate(zip(whole, part, strict=True)) if size != other]
    axis = differing[0]
    return axis if len(differing) == 1 and axis < len(whole) - 1 and part[axis] < whole[axis] else None
