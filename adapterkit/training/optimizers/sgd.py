"""SGD of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from adapterkit.training.optimizer import OptimizerConfig


class SGD(OptimizerConfig):
    """Stochastic gradient descent.

    Attributes:
        momentum: How much of the last step goes into the next one.
        dampening: How much of the gradient stays out of the momentum.
        nesterov: Look ahead by the momentum; it needs momentum, and no dampening.
    """

    usual_rate: ClassVar[float] = 1e-2
    kept: ClassVar[float] = 1.0

    momentum: float = Field(0.9, ge=0)
    dampening: float = Field(0.0, ge=0)
    nesterov: bool = False

    @model_validator(mode="after")
    def _fits(self) -> SGD:
        if self.nesterov and (not self.momentum or self.dampening):
            raise ValueError("nesterov needs momentum above 0 and no dampening")
        return self

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(groups), **self.arguments())
