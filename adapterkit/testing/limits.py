"""A format whose methods must come to an end: one that hangs on a damaged file would hang its user too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from adapterkit.checkpoint import Checkpoint, Format
from adapterkit.points import Points

QUICK, LONG = 2.0, 30.0
"""Seconds for `recognises` and `diagnose`, and for all else."""

_T = TypeVar("_T")


def within(seconds: float, what: str, call: Callable[[], _T]) -> _T:
    """What a call returns or raises; AssertionError where it takes longer."""
    found: list[_T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:  # noqa: BLE001  it is raised again, in the thread that waits
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"{what} takes longer than {seconds:g} s"
    if raised:
        raise raised[0]
    return found[0]


class Limited(Format):
    """A format with limits of time."""

    def __init__(self, inner: Format) -> None:
        self.inner = inner

    def recognises(self, path: Path) -> bool:
        return self._quick("recognises", path)

    def diagnose(self, path: Path) -> None:
        self._quick("diagnose", path)

    def read(self, path: Path, points: Points) -> Checkpoint:
        return within(LONG, f"read({path.name})", lambda: self.inner.read(path, points))

    def read_many(self, path: Path, points: Points) -> dict[str, Checkpoint]:
        return within(LONG, f"read_many({path.name})", lambda: self.inner.read_many(path, points))

    def write(self, checkpoint: Checkpoint, path: Path, points: Points) -> None:
        within(LONG, f"write({path.name})", lambda: self.inner.write(checkpoint, path, points))

    def write_many(self, checkpoints: Mapping[str, Checkpoint], path: Path, points: Points) -> None:
        within(LONG, f"write_many({path.name})", lambda: self.inner.write_many(checkpoints, path, points))

    def _quick(self, method: str, path: Path) -> Any:
        return within(QUICK, f"{method}({path.name})", lambda: getattr(self.inner, method)(path))
