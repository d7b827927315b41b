"""The rate stays, and falls at the end."""

from __future__ import annotations

from pydantic import Field

from adapterkit.training.schedule import ScheduleConfig
from adapterkit.training.schedules.fields import Floor


class StableDecay(ScheduleConfig):
    """Constant, then a straight fall (https://arxiv.org/abs/2404.06395, equation 1, with a linear decay).

    Attributes:
        decay: The share of the steps in which it falls.
        floor: The share of the rate that is left at the end.
    """

    decay: float = Field(0.2, gt=0, le=1)
    floor: Floor = 0.0

    def factor(self, step: int, steps: int) -> float:
        left = (steps - step) / (self.decay * steps)
        return self.floor + (1.0 - self.floor) * max(min(left, 1.0), 0.0)
