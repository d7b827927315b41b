"""Ctrl-C, SIGTERM and SIGHUP ask the loop to stop after the step it is in; a second one stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# SIGHUP comes when the terminal is closed; Windows has none.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupt:
    """A context in which the first signal only sets `signal`, and the second raises KeyboardInterrupt.

    Does nothing outside of the main thread. What is ignored (by `nohup`, by a shell for what runs behind) stays so.

    Args:
        silent: Say nothing on stderr of what was asked.

    Attributes:
        signal: The first signal that came, or None.
    """

    def __init__(self, *, silent: bool = True) -> None:
        self.signal: signal.Signals | None = None
        self._silent = silent
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int | None:
        """What a shell expects of a process that this signal ended: 129, 130 or 143."""
        return None if self.signal is None else 128 + self.signal

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
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        told = f"{self.signal.name}: stopping after this step, with a checkpoint; a second one stops at once\n"
        if not self._silent:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, told.encode())  # print() must not be called from here: it may be what was interrupted


def ignore_in_worker(number: int) -> None:
    """For processes that read data: a terminal and a scheduler signal the whole group, and the trainer decides."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
