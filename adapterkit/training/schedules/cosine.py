"""The rate falls as half a cosine."""

from __future__ import annotations

import math

from pydantic import Field

from adapterkit.training.schedule import ScheduleConfig
from adapterkit.training.schedules.fields import Floor


class Cosine(ScheduleConfig):
    """Half a cosine, which may begin anew (https://arxiv.org/abs/1608.03983, equation 5).

    Attributes:
        restarts: How often the rate jumps up again; the steps are shared evenly.
        decay: What multiplies the height with every restart.
        floor: The share of the rate that is left at the end.
    """

    restarts: int = Field(0, ge=0)
    decay: float = Field(1.0, gt=0, le=1)
    floor: Floor = 0.0

    def factor(self, step: int, steps: int) -> float:
        cycle, done = divmod(step * (self.restarts + 1), steps)
        if cycle > self.restarts:
            cycle, done = self.restarts, steps
        height = self.decay**cycle
        return self.floor + (height - self.floor) * 0.5 * (1.0 + math.cos(math.pi * done / steps))
