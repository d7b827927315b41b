"""A format whose methods must come to an end: one that hangs on a damaged file would hang its user too."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from adapterkit.checkpoint import Checkpoint, Format, ReadOptions, ReadReport, WriteOptions, WriteReport
from adapterkit.formats.source import Source
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

    def recognises(self, source: Source) -> bool:
        return self._quick("recognises", source)

    def diagnose(self, source: Source) -> None:
        self._quick("diagnose", source)

    def read(self, source: Source, points: Points, options: ReadOptions) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        return within(LONG, f"read({_name(source)})", lambda: self.inner.read(source, points, options))

    def write(
        self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions
    ) -> WriteReport | None:
        call = functools.partial(self.inner.write, checkpoints, target, points, options)
        return within(LONG, f"write({target.name})", call)

    def _quick(self, method: str, source: Source) -> Any:
        return within(QUICK, f"{method}({_name(source)})", lambda: getattr(self.inner, method)(source))


def _name(source: Source) -> object:
    return source.path.name if source.path is not None else source.where
