"""What acts, for every site of a model: one default, which a thread may override for itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from adapterkit.engine.context import Context
from adapterkit.engine.selection import Selection
from adapterkit.errors import AttachError
from adapterkit.layouts import Repeats

_NOTHING = Selection()


class _Local(threading.local):
    """What is this thread's own; `__init__` runs once in each thread.

    The attributes are set on the instance: torch.compile guards what it reads, and a class-level default that an
    instance attribute shadows later would not be read again.
    """

    def __init__(self) -> None:
        self.selection: Selection | None = None
        self.context: dict[str, Tensor] = {}
        self.taps: dict[str, Tensor] = {}
        self.lengths: dict[str, tuple[int, int]] = {}
        self.calls: list[None] = []  # a list: torch.compile loses count of a number that is kept here


class Switch:
    """Holds the selection, and the residual streams on their way to the sublayers' ends."""

    def __init__(self) -> None:
        self.default = Selection()
        self.folded = False
        self.local = _Local()

    @property
    def current(self) -> Selection:
        """The selection that a forward in this thread sees; nothing acts beside weights that are folded."""
        if self.folded:
            return _NOTHING
        own = self.local.selection
        return self.default if own is None else own

    @contextlib.contextmanager
    def overridden(self, selection: Selection) -> Iterator[None]:
        """This thread sees another selection inside the block."""
        local = self.local
        before = local.selection
        local.selection = selection
        try:
            yield
        finally:
            local.selection = before

    @contextlib.contextmanager
    def given(self, context: Mapping[str, Tensor]) -> Iterator[None]:
        """This thread has further side inputs inside the block, beside those of the blocks around it."""
        local = self.local
        before = local.context
        local.context = {**before, **context}
        try:
            yield
        finally:
            local.context = before

    def recalled(self) -> contextlib.AbstractContextManager[None]:
        """A block in which a thread sees what this one sees now: the selection and the side inputs."""
        return _recalled(self, self.current, self.local.context)

    def side(self, x: Tensor, at: str, repeats: Repeats | None = None) -> Context:
        """The side inputs as the adapters at a point see them, whose input is x."""
        return Context(self.local.context, x, at, repeats)

    def replace(self, selection: Selection) -> None:
        """Puts a selection in the place of what this thread sees."""
        if self.local.selection is None:
            self.default = selection
        else:
            self.local.selection = selection

    def forget(self, name: str) -> None:
        """Takes an adapter that is no more out of what acts, for all threads and for this one."""
        self.default = self.default.without(frozenset({name}))
        if self.local.selection is not None:
            self.local.selection = self.local.selection.without(frozenset({name}))

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
        self.local = _Local()


@contextlib.contextmanager
def _recalled(switch: Switch, selection: Selection, context: Mapping[str, Tensor]) -> Iterator[None]:
    with switch.overridden(selection), switch.given(context):
        yield
