"""One change of a model's adapters at a time; a fork waits for it, so that the child has no half of one."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import weakref


class Turn:
    """A lock, which a thread may take again while it has it. A forked child finds it free."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _turns().add(self)

    def take(self, *, seconds: float = -1) -> bool:
        """Whether it could be taken within some time, or ever."""
        return self._lock.acquire(timeout=seconds)

    def give_back(self) -> None:
        """Lets another thread have it."""
        self._lock.release()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.give_back()


class _Turns:
    """Every turn that there is. A fork takes them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakSet[Turn] = weakref.WeakSet()
        self._taken: list[Turn] = []

    def add(self, turn: Turn) -> None:
        with self._lock:
            self._known.add(turn)

    def take(self) -> None:
        while not self._take():  # never waits long for one while it has another: who has that may want this
            time.sleep(0.001)

    def _take(self) -> bool:
        self._lock.acquire()
        for turn in list(self._known):
            if not turn.take(seconds=0.05):
                self.give_back()
                return False
            self._taken.append(turn)
        return True

    def give_back(self) -> None:
        while self._taken:
            self._taken.pop().give_back()
        self._lock.release()


@functools.cache
def _turns() -> _Turns:
    turns = _Turns()
    if sys.platform != "win32":
        os.register_at_fork(before=turns.take, after_in_parent=turns.give_back, after_in_child=turns.give_back)
    return turns


@functools.cache
def first_turn() -> Turn:
    """The turn of who adds a model its first adapter: until then nothing on it tells a handle of another."""
    return Turn()
