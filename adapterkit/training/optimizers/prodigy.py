"""Prodigy of the package prodigyopt."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from adapterkit.training.optimizer import OptimizerConfig
from adapterkit.training.optimizers.fields import Betas

_library: Any = importlib.import_module("prodigyopt")


class Prodigy(OptimizerConfig):
    """AdamW that estimates the distance to the solution, and so its learning rate (https://arxiv.org/abs/2306.06101).

    Attributes:
        betas: How slowly the averages of the gradient and of its square forget.
        eps: Added to the root of the latter.
        use_bias_correction: As Adam does at the start.
        safeguard_warmup: Leave the warm-up out of the estimate.
        d0: The first estimate.
        d_coef: What multiplies the estimate.
        slice_p: Estimate from every that many numbers of a parameter, which saves memory.
    """

    usual_rate: ClassVar[float] = 1.0
    one_rate: ClassVar[bool] = True
    kept: ClassVar[float] = 4.0

    betas: Betas = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    use_bias_correction: bool = False
    safeguard_warmup: bool = False
    d0: float = Field(1e-6, gt=0)
    d_coef: float = Field(1.0, gt=0)
    slice_p: int = Field(1, gt=0)

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return _library.Prodigy(list(groups), **self.arguments())
