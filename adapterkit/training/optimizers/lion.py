"""Lion of the package lion-pytorch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from adapterkit.training.optimizer import OptimizerConfig
from adapterkit.training.optimizers.fields import Betas

_library: Any = importlib.import_module("lion_pytorch")


class Lion(OptimizerConfig):
    """The sign of a momentum (https://arxiv.org/abs/2302.06675, algorithm 2).

    Attributes:
        betas: How much of the momentum is in a step, and how slowly the momentum forgets.
    """

    usual_rate: ClassVar[float] = 3e-5
    kept: ClassVar[float] = 1.0

    betas: Betas = (0.9, 0.99)

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return _library.Lion(list(groups), **self.arguments())
