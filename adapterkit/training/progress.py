"""What a run tells while it goes on: a bar on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TextIO

from adapterkit.errors import printable

RECENT = 50
"""Steps whose mean loss is told."""


class Progress(ABC):
    """Told of every step, between `__enter__` and `__exit__`.

    The loss that it tells is a running mean: that of one step says little.
    """

    total = start = 0

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._seen, self._unit = 0, ""
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def begin(self, total: int, start: int, losses: Sequence[float] = ()) -> None:
        """The first step starts now: what came before does not count as training time.

        Args:
            total: Steps of the run.
            start: Steps that are already done.
            losses: Of the last of them.
        """
        self.total, self.start = total, start
        self._losses.extend(losses)
        self._began = time.monotonic()

    def step(self, step: int, loss: float, rate: float, seen: int = 0, unit: str = "examples") -> None:
        """A step is done.

        Args:
            step: Its number, from 1.
            loss, rate: Its loss and learning rate.
            seen: How much it has seen, in all processes.
            unit: Of what.
        """
        self._losses.append(loss)
        self._seen, self._unit = self._seen + seen, unit
        mean = sum(self._losses) / len(self._losses)
        self.show(step, f"loss {mean:.4f}  lr {rate:.2e}  {self.pace(step)}  ETA {self.remaining(step)}")

    @abstractmethod
    def show(self, step: int, status: str) -> None:
        """A step is done, and this is how it goes."""

    @abstractmethod
    def message(self, text: str) -> None:
        """One line for people."""

    def pace(self, step: int) -> str:
        """Steps, and what they have seen, per second; empty where none was made."""
        if step <= self.start or not self.total:
            return ""
        seen = self._seen / max(time.monotonic() - self._began, 1e-9)
        return f"{self.speed(step):.2f} steps/s  {seen:.3g} {self._unit}/s"

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

    def __init__(self, every: int, stream: TextIO | None = None) -> None:
        super().__init__()
        self.every = every
        self.stream = stream if stream is not None else sys.stderr

    def show(self, step: int, status: str) -> None:
        if step % self.every == 0 or step == self.total:
            self.message(f"step {step}/{self.total}  {status}")

    def message(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed, or a pipe's end, stops no training
            print(printable(text), file=self.stream, flush=True)


class BarProgress(Progress):
    """A bar that rich draws."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        super().__init__()
        columns = (MofNCompleteColumn(), BarColumn(None), TextColumn("{task.fields[status]}"))
        self._bar: Any = Bar(*columns, console=Console(stderr=True))
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._bar.stop()

    def begin(self, total: int, start: int, losses: Sequence[float] = ()) -> None:
        super().begin(total, start, losses)
        self._task = self._bar.add_task("", total=total, completed=start, status="")

    def show(self, step: int, status: str) -> None:
        with contextlib.suppress(OSError):
            self._bar.update(self._task, completed=step, status=status)

    def message(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._bar.console.print(printable(text), highlight=False, markup=False)


class NoProgress(Progress):
    """Says nothing: for all processes but the first, and for tests."""

    def show(self, step: int, status: str) -> None: ...

    def message(self, text: str) -> None: ...


def make_progress(every: int, *, silent: bool = False) -> Progress:
    """The bar on a terminal, lines where stderr goes elsewhere, nothing where it is to be silent."""
    if silent:
        return NoProgress()
    return BarProgress() if sys.stderr.isatty() else PlainProgress(every)
