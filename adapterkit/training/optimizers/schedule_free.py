"""Schedule-free AdamW of the package schedulefree."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from adapterkit.training.optimizer import OptimizerConfig
from adapterkit.training.optimizers.fields import Betas

_library: Any = importlib.import_module("schedulefree")


class ScheduleFree(OptimizerConfig):
    """AdamW whose average of the past steps replaces a schedule (https://arxiv.org/abs/2405.15682, algorithm 1).

    Samples, figures and files are of that average. Leave `scheduler` constant.

    Attributes:
        betas: How near to the average gradients are taken, and how slowly the average of their squares forgets.
        eps: Added to the root of the latter.
        r: The power of a step's number that weighs it in the average.
        weight_lr_power: The power of the learning rate that does, in the warm-up.
    """

    usual_rate: ClassVar[float] = 1e-3
    averages: ClassVar[bool] = True

    betas: Betas = (0.9, 0.999)
    eps: float = Field(1e-8, ge=0)
    r: float = 0.0
    weight_lr_power: float = 2.0

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return _library.AdamWScheduleFree(list(groups), **self.arguments())
