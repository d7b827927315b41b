"""Timing of alternatives side by side: in one process, in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Side:
    """One alternative.

    Attributes:
        run: What is timed.
        prepare: Makes the argument of `run`, anew for each measurement; not timed.
        after: Undoes what `run` did, given the same argument; not timed.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    after: Callable[[Any], object] = lambda _: None


@dataclass(frozen=True)
class Timing:
    """Seconds of wall clock of each measurement, and of this process's CPU time (all threads together)."""

    wall: Sequence[float]
    cpu: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def quartiles(self) -> tuple[float, float]:
        """What a quarter and three quarters of the measurements stay below."""
        low, _, high = statistics.quantiles(self.wall, n=4, method="inclusive")
        return low, high

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)

    def summary(self) -> dict[str, float | int]:
        """For JSON, in seconds."""
        low, high = self.quartiles
        return {
            "median": self.median,
            "quartile_1": low,
            "quartile_3": high,
            "minimum": min(self.wall),
            "cpu_median": self.cpu_median,
            "measurements": len(self.wall),
        }


def measure(sides: Mapping[str, Side], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Every side once, `warmup + rounds` times over; every other round in reverse order. Warm-up is not counted."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        names = list(sides) if number % 2 else list(reversed(sides))
        for name in names:
            elapsed, used = once(sides[name])
            if number >= warmup:
                wall[name].append(elapsed)
                cpu[name].append(used)
    return {name: Timing(wall[name], cpu[name]) for name in sides}


def once(side: Side) -> tuple[float, float]:
    """Wall and CPU seconds of one run. Garbage is collected before it, never during it."""
    argument = side.prepare()
    gc.collect()
    gc.disable()
    try:
        start, cpu = time.perf_counter(), time.process_time()
        side.run(argument)
        return time.perf_counter() - start, time.process_time() - cpu
    finally:
        gc.enable()
        side.after(argument)
