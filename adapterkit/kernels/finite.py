"""Whether tensors hold numbers at all."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_SUMMED = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


_SMALL, _TOGETHER = 1 << 15, 1 << 20
"""Numbers in a tensor that is looked at with others, and in all of those."""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether none of them has a value that is NaN or infinite. Small ones of a shape are summed together."""
    alike: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() > _SMALL or tensor.dtype not in _SUMMED or tensor.is_meta:
            if not_finite(tensor):
                return False
        else:
            alike.setdefault((tensor.dtype, tensor.shape), []).append(tensor)
    groups = ((own, max(1, _TOGETHER // max(1, shape.numel()))) for (_, shape), own in alike.items())
    chunks = (own[at : at + count] for own, count in groups for at in range(0, len(own), count))
    return not any(not_finite(torch.stack(chunk)) for chunk in chunks)


def not_finite(tensor: Tensor) -> int:
    """How many values of a tensor, of any shape and dtype, are NaN or infinite."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return 0
    wide = _SUMMED.get(tensor.dtype)
    # One NaN or infinity makes the sum one too. A sum that only overflows is counted to be sure.
    if wide is not None and math.isfinite((tensor.sum() if wide is tensor.dtype else tensor.sum(dtype=wide)).item()):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor.float() if wide is None else tensor).sum())
