"""One change of a model's adapters at a time; a process that forks waits for it, so that its child has no half of one."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import weakref
from collections.abc import Iterator


class Turn:
    """A lock, which a thread may take again while it has it. A forked child finds it free."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _all_turns().add(self)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """A block in which no other thread has it."""
        with self._lock:
            yield


class _Turns:
    """Every lock that there is; a fork takes them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakSet[Turn] = weakref.WeakSet()
        self._taken = contextlib.ExitStack()

    def add(self, turn: Turn) -> None:
        with self._lock:
            self._known.add(turn)

    def take(self) -> None:
        while True:
            known, taken = self._snapshot(), contextlib.ExitStack()
            for turn in known:
                taken.enter_context(turn.taken())
            self._lock.acquire()  # from here on no other comes to be
            if self._known <= known:
                self._taken = taken
                return
            self._lock.release()
            taken.close()

    def _snapshot(self) -> set[Turn]:
        with self._lock:
            return set(self._known)

    def give_back(self) -> None:
        self._taken.close()
        self._lock.release()


@functools.cache
def _all_turns() -> _Turns:
    turns = _Turns()
    if sys.platform != "win32":
        os.register_at_fork(before=turns.take, after_in_parent=turns.give_back, after_in_child=turns.give_back)
    return turns
