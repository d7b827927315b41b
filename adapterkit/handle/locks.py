"""One change of a model's adapters at a time; a fork waits for it, so that the child has no half of one."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import weakref


class Lock:
    """A lock, which a thread may take again while it has it. A forked child finds it free."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks().add(self)

    def acquire(self, *, seconds: float = -1) -> bool:
        """Whether it could be taken within some time, or ever."""
        return self._lock.acquire(timeout=seconds)

    def release(self) -> None:
        """Lets another thread have it."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Locks:
    """Every lock that there is. A fork takes them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakSet[Lock] = weakref.WeakSet()
        self._taken: list[Lock] = []

    def add(self, lock: Lock) -> None:
        with self._lock:
            self._known.add(lock)

    def acquire(self) -> None:
        while not self._try():  # never waits long for one while it has another: who has that may want this
            time.sleep(0.001)

    def _try(self) -> bool:
        self._lock.acquire()
        for lock in list(self._known):
            if not lock.acquire(seconds=0.05):
                self.release()
                return False
            self._taken.append(lock)
        return True

    def release(self) -> None:
        while self._taken:
            self._taken.pop().release()
        self._lock.release()


@functools.cache
def _locks() -> _Locks:
    locks = _Locks()
    if sys.platform != "win32":
        os.register_at_fork(before=locks.acquire, after_in_parent=locks.release, after_in_child=locks.release)
    return locks


@functools.cache
def first_lock() -> Lock:
    """Held by whoever adds a model its first adapter: until then nothing on it tells a handle of another."""
    return Lock()
