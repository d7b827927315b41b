"""AdamW of bitsandbytes, which keeps its moments in eight bits."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from adapterkit.training.optimizer import OptimizerConfig
from adapterkit.training.optimizers.fields import Betas

_library: Any = importlib.import_module("bitsandbytes.optim")


class AdamW8bit(OptimizerConfig):
    """AdamW with moments of eight bits, in blocks (https://arxiv.org/abs/2110.02861).

    Attributes:
        betas: How slowly the averages of the gradient and of its square forget.
        eps: Added to the root of the latter.
        min_8bit_size: Parameters with fewer numbers than this keep moments of 32 bits.
    """

    kept: ClassVar[float] = 0.5

    betas: Betas = (0.9, 0.999)
    eps: float = Field(1e-8, ge=0)
    min_8bit_size: int = Field(4096, ge=0)

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return _library.AdamW8bit(list(groups), **self.arguments())
