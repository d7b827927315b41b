"""Ctrl-C, SIGTERM and SIGHUP end a run where it can be ended: what the first one does depends on what goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

# SIGHUP comes when the terminal is closed; Windows has none.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@dataclass(frozen=True)
class Stage:
    """What a signal does while something goes on.

    Attributes:
        told: What is said of the first one.
        at_once: Whether the first one ends it by a KeyboardInterrupt; else it is noted.
        held: Whether all others are noted too; else the second one ends it.
    """

    told: str
    at_once: bool = False
    held: bool = False


BEFORE = Stage("stopping; no step has been made", at_once=True)
STEPS = Stage("stopping after this step, with a checkpoint; a second one stops at once")
SAVING = Stage("stopping when the file is written", held=True)
SAMPLES = Stage("stopping; this evaluation, or these samples, are left out", at_once=True)
TOGETHER = Stage("stopping after this evaluation, or these samples; a second one stops at once")


class Interrupt:
    """A context in which a signal does what the stage says that the run is in.

    Does nothing outside of the main thread. What is ignored (by `nohup`, by a shell for what runs behind) stays so.

    Args:
        silent: Say nothing on stderr of what was asked.

    Attributes:
        signal: The first signal that came, or None.
        stage: What goes on.
    """

    def __init__(self, *, silent: bool = True) -> None:
        self.signal: signal.Signals | None = None
        self.silent = silent
        self.stage = BEFORE
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that this signal ended: 129, 130 or 143; 0 where none came."""
        return 0 if self.signal is None else 128 + self.signal

    @contextlib.contextmanager
    def during(self, stage: Stage) -> Iterator[None]:
        """What goes on inside of a block."""
        outer, self.stage = self.stage, stage
        try:
            yield
        finally:
            self.stage = outer

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, stage = self.signal is None, self.stage
        if first:
            self.signal = signal.Signals(number)
            self._tell(f"{self.signal.name}: {stage.told}\n")
        if not stage.held and (stage.at_once or not first):
            raise KeyboardInterrupt

    def _tell(self, line: str) -> None:
        if not self.silent:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, line.encode())  # print() must not be called from here: it may be what was interrupted


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal that comes inside is answered at the end, so that no process which is being started dies of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    known = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for number in known:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in known.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def ignore_in_worker(number: int) -> None:
    """For processes that read data: a terminal and a scheduler signal the whole group, and the trainer decides."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
