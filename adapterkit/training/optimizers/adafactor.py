"""Adafactor of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from adapterkit.training.optimizer import OptimizerConfig


class Adafactor(OptimizerConfig):
    """Second moments by rows and columns (https://arxiv.org/abs/1804.04235, algorithm 5).

    The learning rate is relative to the size of each parameter.

    Attributes:
        beta2_decay: The exponent with which the average of the squares forgets more slowly.
        d: The bound of an update's root mean square.
    """

    usual_rate: ClassVar[float] = 1e-2
    kept: ClassVar[float] = 0.1

    beta2_decay: float = Field(-0.8, le=0)
    d: float = Field(1.0, ge=1)

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(list(groups), **self.arguments())
