"""The rate stays."""

from __future__ import annotations

from adapterkit.training.schedule import ScheduleConfig


class Constant(ScheduleConfig):
    """No change after the warm-up."""

    def factor(self, step: int, steps: int) -> float:
        return 1.0
