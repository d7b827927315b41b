"""The rate falls with the square root of the step."""

from __future__ import annotations

import math

from pydantic import Field

from adapterkit.training.schedule import ScheduleConfig


class InverseSqrt(ScheduleConfig):
    """Without an end, so that a run can go on for as long as one likes (https://arxiv.org/abs/1706.03762, equation 3).

    Attributes:
        timescale: After three times as many steps the rate has halved.
    """

    timescale: int = Field(1000, gt=0)

    def factor(self, step: int, steps: int) -> float:
        return math.sqrt(self.timescale / (step + self.timescale))
