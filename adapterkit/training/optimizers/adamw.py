"""AdamW of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from adapterkit.training.optimizer import OptimizerConfig
from adapterkit.training.optimizers.fields import Betas

_FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})


class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101, algorithm 2).

    Attributes:
        betas: How slowly the averages of the gradient and of its square forget.
        eps: Added to the root of the latter.
        amsgrad: Divide by the largest of those averages so far.
        fused: One kernel for all parameters; by default where torch has one.
    """

    betas: Betas = (0.9, 0.999)
    eps: float = Field(1e-8, ge=0)
    amsgrad: bool = False
    fused: bool | None = None

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        fused = devices <= _FUSED if self.fused is None else self.fused
        return torch.optim.AdamW(list(groups), **{**self.arguments(), "fused": fused})
