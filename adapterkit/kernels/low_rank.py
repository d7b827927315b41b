"""What a low-rank update computes, in every form of a layer; see `adapterkit.contract.factors`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkit.contract.factors import Factors
from adapterkit.kernels.weights import apply_weight, mix_features
from adapterkit.points import WeightLayout


def reduced(x: Tensor, a: Tensor, layout: WeightLayout) -> Tensor:
    """`A(x)`: x's shape as the module's output, with `rank` features (times groups).

    A is cast to x's dtype, never x to its: factors are small, and x is not. Rows that indices look up keep theirs.
    """
    return apply_weight(x, a if layout.form == "embedding" else a.to(x.dtype), layout)


def expanded(h: Tensor, b: Tensor, layout: WeightLayout, scale: float) -> Tensor:
    """`scale * B(h)`, in the dtype of h."""
    y = mix_features(h, b.to(h.dtype), layout)
    return y if scale == 1.0 else y * scale


Update = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""`(x, A, B, scale)` -> `scale * B(A(x))`, in the dtype of x; of A at an embedding."""


def update_of(layout: WeightLayout) -> Update:
    """What computes an update in this layout. Chosen once, and not in every call; it can be pickled."""
    return _linear if layout.form in ("linear", "linear_t") else functools.partial(_other, layout)


def update(x: Tensor, factors: Factors) -> Tensor:
    """`scale * B(A(x))`, in the dtype of x; of A at an embedding."""
    return update_of(factors.layout)(x, factors.A, factors.B, factors.scale)


def _linear(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    if a.dtype == b.dtype == x.dtype:
        y = F.linear(F.linear(x, a), b)
    else:
        h = F.linear(x, a.to(x.dtype))
        y = F.linear(h, b.to(h.dtype))
    return y if scale == 1.0 else y * scale


def _other(layout: WeightLayout, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return expanded(reduced(x, a, layout), b, layout, scale)


def dense(factors: Factors) -> Tensor:
    """`scale * B A`, [out, in / groups, *kernel], in float32 or wider, so that a merge rounds once."""
    wide = torch.promote_types(factors.A.dtype, torch.float32)
    product = factors.B.to(wide) @ factors.A.to(wide).flatten(1)
    return product.unflatten(1, factors.A.shape[1:]) * factors.scale


def added(weight: Tensor, factors: Factors, strength: float = 1.0) -> Tensor:
    """`weight + strength * scale * B A` in one pass over the weight, in its dtype."""
    a, b = (factor.to(weight.dtype) for factor in (factors.A, factors.B))
    scale = strength * factors.scale
    return torch.addmm(weight.flatten(1), b, a.flatten(1), alpha=scale).view(weight.shape)


# -- a batch whose rows have factors of their own ---------------------------------------------------------------------

_LAUNCH = {"cpu": 40_000}
_LAUNCH_ELSEWHERE = 5_000_000
"""Numbers that are copied in the time that it takes to start one more operation: measured on a CPU (see the benchmark
"routes"), reckoned for a GPU (5 us at 2 TB/s)."""


def is_mixable(x: Tensor, several: Sequence[Factors], rows: int) -> bool:
    """Whether `mixed` is how to compute with these: it can be, and is cheaper than one after the other.

    One after the other costs two operations for each of them; mixed, a copy of its factors for each row.
    """
    first = several[0]
    same = all(one.A.shape == first.A.shape and one.B.shape == first.B.shape for one in several)
    if not same or first.A.ndim != 2 or first.layout.form == "embedding" or x.shape[-1] != first.A.shape[1]:
        return False
    copied = rows * (first.A.numel() + first.B.numel())
    return copied <= 2 * len(several) * _LAUNCH.get(x.device.type, _LAUNCH_ELSEWHERE)


def mixed(x: Tensor, several: Sequence[Factors], owners: Sequence[int]) -> Tensor:
    """`scale * B(A(x))` for each row with its own factors, of equal shapes, in three operations for all.

    Args:
        x: [rows, ..., in].
        several: Factors of linear layers.
        owners: For each row, which of them are its own.
    """
    a, b = (torch.stack([several[owner].A for owner in owners]), torch.stack([several[owner].B for owner in owners]))
    h = torch.bmm(x.reshape(len(owners), -1, x.shape[-1]), a.to(x.dtype).mT)
    scales = [several[owner].scale for owner in owners]
    if any(scale != 1.0 for scale in scales):
        h = h * torch.tensor(scales, dtype=h.dtype).to(h.device).view(-1, 1, 1)
    return torch.bmm(h, b.to(h.dtype).mT).view(*x.shape[:-1], b.shape[1])
