"""What a run tells while it goes on: a bar on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, TextIO

from adapterkit.errors import printable


class Progress(ABC):
    """Told of every step, between `__enter__` and `__exit__`.

    Args:
        total: Steps of the run.
        start: Steps that are already done.
    """

    def __init__(self, total: int, start: int) -> None:
        self.total, self.start = total, start
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def begin(self) -> None:
        """The first step starts now: what came before does not count as training time."""
        self._began = time.monotonic()

    @abstractmethod
    def step(self, step: int, loss: float, rate: float) -> None:
        """Step `step` (from 1) is done, with this loss and learning rate."""

    @abstractmethod
    def message(self, text: str) -> None:
        """One line for people."""

    def speed(self, step: int) -> float:
        """Steps per second since the start, samples included."""
        return (step - self.start) / max(time.monotonic() - self._began, 1e-9)

    def remaining(self, step: int) -> str:
        """The time to the end at this speed, as h:mm:ss or m:ss."""
        seconds = round((self.total - step) / max(self.speed(step), 1e-9))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class PlainProgress(Progress):
    """A line every few steps.

    Args:
        every: Steps between lines; the last step always has one.
        stream: Where they go.
    """

    def __init__(self, total: int, start: int, every: int, stream: TextIO | None = None) -> None:
        super().__init__(total, start)
        self.every = every
        self.stream = stream if stream is not None else sys.stderr

    def step(self, step: int, loss: float, rate: float) -> None:
        if step % self.every == 0 or step == self.total:
            self.message(
                f"step {step}/{self.total}  loss {loss:.4f}  lr {rate:.2e}  "
                f"{self.speed(step):.2f} steps/s  ETA {self.remaining(step)}"
            )

    def message(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed, or a pipe's end, stops no training
            print(printable(text), file=self.stream, flush=True)


class BarProgress(Progress):
    """A bar that rich draws."""

    def __init__(self, total: int, start: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        super().__init__(total, start)
        columns = (MofNCompleteColumn(), BarColumn(None), TextColumn("{task.fields[status]}"))
        self._bar: Any = Bar(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=total, completed=start, status="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._bar.stop()

    def step(self, step: int, loss: float, rate: float) -> None:
        status = f"loss {loss:.4f}  lr {rate:.2e}  {self.speed(step):.2f} steps/s  ETA {self.remaining(step)}"
        with contextlib.suppress(OSError):
            self._bar.update(self._task, completed=step, status=status)

    def message(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._bar.console.print(printable(text), highlight=False, markup=False)


class NoProgress(Progress):
    """Says nothing: for all processes but the first, and for tests."""

    def step(self, step: int, loss: float, rate: float) -> None: ...

    def message(self, text: str) -> None: ...


def make_progress(total: int, start: int, every: int, *, silent: bool = False) -> Progress:
    """The bar on a terminal, lines where stderr goes elsewhere, nothing where it is to be silent."""
    if silent:
        return NoProgress(total, start)
    return BarProgress(total, start) if sys.stderr.isatty() else PlainProgress(total, start, every)
