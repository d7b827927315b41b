"""`with` blocks that say what acts: each thread and each asyncio task is in its own.

A context variable knows which blocks those are. torch.compile cannot trace its `get`, but it takes a property whose
getter is written in C for an attribute, and guards what it gave: so the getter of a property is that very `get`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from adapterkit.engine.selection import Selection

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Key:
    """Which block a scope is of."""

    __slots__ = ("generator", "is_open", "owner", "token")

    def __init__(self) -> None:
        self.is_open = True
        self.owner = _caller()
        self.generator = _generator()
        self.token: Token[View] | None = None


@dataclass(frozen=True, eq=False)
class Scope:
    """What one block says: a selection, or side inputs."""

    key: Key | None
    selection: Selection | None
    context: Mapping[str, Tensor] | None

    @property
    def names(self) -> frozenset[str]:
        """The adapters that it names."""
        return frozenset() if self.selection is None else self.selection.names

    def without(self, name: str) -> Scope:
        """The same, without one adapter."""
        if self.selection is None or name not in self.names:
            return self
        return Scope(self.key, self.selection.without(frozenset({name})), self.context)


class View:
    """What blocks say together; of selections the innermost counts. None where no block gives one."""

    __slots__ = ("__weakref__", "context", "scopes", "selection")

    def __init__(self, scopes: tuple[Scope, ...] = ()) -> None:
        self.show(scopes)

    def show(self, scopes: tuple[Scope, ...]) -> None:
        """Becomes the view of these blocks, from the outermost to the innermost."""
        selection: Selection | None = None
        context: dict[str, Tensor] = {}
        for scope in scopes:
            if scope.selection is not None:
                selection = scope.selection
            if scope.context is not None:
                context = {**context, **scope.context}
        self.selection, self.context, self.scopes = selection, context, scopes

    def without(self, key: Key) -> tuple[Scope, ...]:
        """The blocks but one."""
        return tuple(scope for scope in self.scopes if scope.key is not key)


class _Overlapping(View):
    """What blocks say together of which some are generators': those count that run, before those that are suspended.

    One that is suspended counts where no other does: a generator may also stand for a block (a fixture).
    """

    __slots__ = ()

    def show(self, scopes: tuple[Scope, ...]) -> None:
        self.scopes = scopes

    @property
    def selection(self) -> Selection | None:  # type: ignore[override]
        found = (View(scopes).selection for scopes in (self._running(), self.scopes))
        return next((selection for selection in found if selection is not None), None)

    @property
    def context(self) -> dict[str, Tensor]:  # type: ignore[override]
        return {**View(self.scopes).context, **View(self._running()).context}

    def _running(self) -> tuple[Scope, ...]:
        if torch.compiler.is_dynamo_compiling():
            return self.scopes
        frames = set(_outwards(sys._getframe(1)))
        return tuple(s for s in self.scopes if s.key is None or s.key.generator is None or s.key.generator in frames)


class _Traced(threading.local):
    """The view inside a block that is part of what torch.compile traces; elsewhere None.

    Set on the instance: a class-level default that an instance attribute shadows later would not be guarded.
    """

    def __init__(self) -> None:
        self.view: View | None = None


class Scopes:
    """The blocks around one model.

    Attributes:
        views: What blocks say, where anybody can see it yet. While there is none, nobody is in a block.
    """

    def __init__(self) -> None:
        self._current: ContextVar[View] = ContextVar("adapterkit")
        # Called with the object whose property it is, `get` takes that for its default: a view of no blocks.
        self.here: Any = type("_Here", (View,), {"__slots__": (), "view": property(self._current.get)})()
        self.traced = _Traced()
        self.views: set[weakref.ref[View]] = set()

    @property
    def view(self) -> View:
        """What the caller's blocks say."""
        if torch.compiler.is_dynamo_compiling() and (traced := self.traced.view) is not None:
            return traced
        return self.here.view

    @contextlib.contextmanager
    def entered(
        self, selection: Selection | None = None, context: Mapping[str, Tensor] | None = None
    ) -> Iterator[Key | None]:
        """One more block around the caller's code."""
        if torch.compiler.is_dynamo_compiling():
            traced, before = self.traced, self.traced.view
            traced.view = View((*self.view.scopes, Scope(None, selection, context)))
            try:
                yield None
            finally:
                traced.view = before
            return
        key = Key()
        key.token = self._show((*self.here.view.scopes, Scope(key, selection, context)))
        try:
            yield key
        finally:
            self._leave(key)

    def open(self, *, of_others: bool = False) -> list[Scope]:
        """The scopes of all threads and tasks, or of all but the caller's, whose blocks have not been left."""
        entered = {scope.key: scope for view in self._seen() for scope in view.scopes}
        caller = _caller() if of_others else None
        return [scope for key, scope in entered.items() if key is not None and key.is_open and key.owner != caller]

    def replace(self, selection: Selection) -> bool:
        """Puts a selection into the place of the innermost one, for the caller alone. Whether there is one."""
        view = self.here.view
        for place in reversed(range(len(view.scopes))):
            scope = view.scopes[place]
            if scope.selection is not None:
                instead = Scope(scope.key, selection, scope.context)
                self._show((*view.scopes[:place], instead, *view.scopes[place + 1 :]))
                return True
        return False

    def forget(self, name: str) -> None:
        """Takes an adapter that is no more out of the caller's blocks.

        In those of others it is marked: a task may have outlived the block in which it was started.
        """
        scopes = self.here.view.scopes
        if any(name in scope.names for scope in scopes):
            self._show(tuple(scope.without(name) for scope in scopes))
        for scope in (scope for view in self._seen() for scope in view.scopes):
            if scope.selection is not None and name in scope.names:
                scope.selection.lost = name

    def _show(self, scopes: tuple[Scope, ...]) -> Token[View]:
        mixed = len(scopes) > 1 and any(scope.key is not None and scope.key.generator for scope in scopes)
        view = _Overlapping(scopes) if mixed else View(scopes)
        self.views.add(weakref.ref(view, self.views.discard))
        return self._current.set(view)

    def _seen(self) -> list[View]:
        views = (reference() for reference in list(self.views))
        return [view for view in views if view is not None]

    def _leave(self, key: Key) -> None:
        """Takes a block out, wherever it stands: generators end in any order, and in any thread or task."""
        key.is_open, key.generator, token, key.token = False, None, key.token, None
        view = self.here.view
        inner = view.scopes and view.scopes[-1].key is not key
        left = view.without(key)
        try:
            self._current.reset(token)  # type: ignore[arg-type]
        except ValueError:  # entered in another thread or task
            for one in self._seen():
                if len(rest := one.without(key)) < len(one.scopes):
                    one.show(rest)
            inner = True
        else:
            if self.here.view.scopes != left:
                self._show(left)
        if inner:
            warnings.warn(_OVERLAP, stacklevel=4)


_OVERLAP = (
    "a block that says what acts was left while one entered after it was open, or in another thread or task than it "
    "was entered in. Generators do so; what ran between outside of them, or was compiled, may have seen another's "
    "adapters. Give each a task or a thread"
)


def _generator() -> FrameType | None:
    """The generator in which a block was entered, or None; one by which contextlib makes a block is none."""
    frame, *outer = _outwards(sys._getframe(1))
    for back in outer:
        drives = back.f_code.co_filename == contextlib.__file__
        if not drives and frame.f_code.co_filename not in (contextlib.__file__, __file__):
            return frame if frame.f_code.co_flags & _GENERATOR else None
        frame = back
    return None


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _caller() -> tuple[int, object]:
    """The thread and the task."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task
