"""The rate falls by a power of what is left."""

from __future__ import annotations

from pydantic import Field

from adapterkit.training.schedule import ScheduleConfig
from adapterkit.training.schedules.fields import Floor


class Linear(ScheduleConfig):
    """From all of the rate to `floor`, in a straight line.

    Attributes:
        floor: The share of the rate that is left at the end.
    """

    floor: Floor = 0.0

    def factor(self, step: int, steps: int) -> float:
        return self.floor + (1.0 - self.floor) * (1.0 - min(step / steps, 1.0))


class Polynomial(ScheduleConfig):
    """From all of the rate to `floor`, by a power of the share that is left.

    Attributes:
        power: 1 is a straight line; above it, the rate falls early.
        floor: The share of the rate that is left at the end.
    """

    power: float = Field(2.0, gt=0)
    floor: Floor = 0.0

    def factor(self, step: int, steps: int) -> float:
        return self.floor + (1.0 - self.floor) * (1.0 - min(step / steps, 1.0)) ** self.power
