"""Whether tensors hold numbers at all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SUMMED = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


def not_finite(tensor: Tensor) -> int:
    """How many values of a tensor, of any shape and dtype, are NaN or infinite."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return 0
    wide = _SUMMED.get(tensor.dtype)
    # One NaN or infinity makes the sum one too. A sum that only overflows is counted to be sure.
    if wide is not None and math.isfinite((tensor.sum() if wide is tensor.dtype else tensor.sum(dtype=wide)).item()):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor.float() if wide is None else tensor).sum())
