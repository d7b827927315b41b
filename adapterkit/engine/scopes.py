"""`with` blocks that say what acts: each thread and each asyncio task is in its own.

A context variable knows which blocks those are. torch.compile cannot trace its `get`, but it takes a property whose
getter is written in C for an attribute, and guards what it gave: so the getter of a property is that very `get`.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.engine.selection import Selection


class Key:
    """Which block a scope is of."""

    __slots__ = ("is_open", "token")

    def __init__(self) -> None:
        self.is_open = True
        self.token: Token[View] | None = None


@dataclass(frozen=True, eq=False)
class Scope:
    """What one block says: a selection, or side inputs."""

    key: Key | None
    selection: Selection | None
    context: Mapping[str, Tensor] | None


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


class _Traced(threading.local):
    """The view inside a block that is part of what torch.compile traces; elsewhere None.

    Set on the instance: a class-level default that an instance attribute shadows later would not be guarded.
    """

    def __init__(self) -> None:
        self.view: View | None = None


class Scopes:
    """The blocks around one model."""

    def __init__(self) -> None:
        self._current: ContextVar[View] = ContextVar("adapterkit")
        # Called with the object whose property it is, `get` takes that for its default: a view of no blocks.
        self.here: Any = type("_Here", (View,), {"__slots__": (), "view": property(self._current.get)})()
        self.traced = _Traced()
        self._views: set[weakref.ref[View]] = set()

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

    def open(self) -> list[Scope]:
        """The scopes of all threads and tasks whose blocks have not been left."""
        return list({scope.key: scope for view in self._seen() for scope in view.scopes if _is_open(scope)}.values())

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

    def lose(self, name: str) -> None:
        """Marks what names an adapter that is no more: a task may have outlived the block in which it was started."""
        for scope in (scope for view in self._seen() for scope in view.scopes):
            if scope.selection is not None and name in scope.selection.names:
                scope.selection.lost = name

    def _show(self, scopes: tuple[Scope, ...]) -> Token[View]:
        view = View(scopes)
        self._views.add(weakref.ref(view, self._views.discard))
        return self._current.set(view)

    def _seen(self) -> list[View]:
        views = (reference() for reference in list(self._views))
        return [view for view in views if view is not None]

    def _leave(self, key: Key) -> None:
        """Takes a block out, wherever it stands: generators end in any order, and in any thread or task."""
        key.is_open, token, key.token = False, key.token, None
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
    "a block that says what acts was left while one entered after it was open, or in another thread or task than it was "
    "entered in, as generators do: what ran between may have seen the other's adapters. Give each a task or a thread"
)


def _is_open(scope: Scope) -> bool:
    return scope.key is not None and scope.key.is_open
