"""The contract of a schedule: the keys under `scheduler` in a run file, and how the learning rate goes on."""

from __future__ import annotations

from abc import ABC, abstractmethod

from adapterkit.training.config import Section


class ScheduleConfig(Section, ABC):
    """Its fields are the keys of a run file. A function of the step alone, so that runs resume."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """What multiplies the learning rate.

        Args:
            step: Steps since the warm-up, from 0.
            steps: All that follow the warm-up, 1 or more.
        """
