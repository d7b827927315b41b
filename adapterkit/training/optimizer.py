"""The contract of an optimizer: the keys under `optimizer` in a run file, and what they build."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from adapterkit.training.config import Section


class OptimizerConfig(Section, ABC):
    """Its fields are the keys of a run file; the names and defaults are best those of the optimizer itself.

    Attributes:
        usual_rate: The learning rate where the run file says none.
        one_rate: Whether all parameters must have one learning rate.
        kept: How many numbers it remembers of each that it trains, of 32 bits: what a run takes is foreseen by it.
        averages: Whether it averages the steps itself, by methods `train` and `eval`.
    """

    usual_rate: ClassVar[float] = 1e-4
    one_rate: ClassVar[bool] = False
    kept: ClassVar[float] = 2.0
    averages: ClassVar[bool] = False

    @abstractmethod
    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer; whatever it keeps in its state or groups is a tensor or a number, so that runs resume.

        Args:
            groups: Each with `params`, `lr` and `weight_decay`. The trainer sets `lr` before every step.
        """

    def arguments(self) -> dict[str, Any]:
        """The fields, by name."""
        return {name: getattr(self, name) for name in type(self).model_fields}
