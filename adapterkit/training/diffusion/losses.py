"""How far a prediction is off."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared(prediction: Tensor, target: Tensor, delta: float | None = None) -> Tensor:
    """The squared error of every number; with a delta its pseudo-Huber form, which grows linearly beyond it.

    2 d (sqrt(e^2 + d^2) - d), as in Song and Dhariwal 2023, arXiv:2310.14189, section 3.3, scaled so that small errors
    count as without.
    """
    error = (prediction - target) ** 2
    return error if delta is None else 2 * delta * (torch.sqrt(error + delta**2) - delta)


def per_example(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean errors of the examples, [batch].

    Args:
        error: [batch, channels, ..., height, width].
        mask: What counts how much, [batch, 1, height, width], of the error's size or of the pictures'. An example of
            which nothing counts has the error 0.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    fitted = F.interpolate(mask.float(), error.shape[-2:], mode="area")
    share = fitted.view(len(error), *(1,) * (error.ndim - 3), *fitted.shape[-2:]).expand_as(error)
    return (error * share).flatten(1).sum(1) / share.flatten(1).sum(1).clamp(min=1e-8)
