"""One view of every weight, [out, in / groups, *kernel], and what a module of that layout computes with it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from adapterkit.points import WeightLayout

_TRANSPOSED = ("linear_t", "embedding")
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def canonical(weight: Tensor, layout: WeightLayout) -> Tensor:
    """The module's weight as [out, in / groups, *kernel]: a view. Its own inverse."""
    return weight.mT if layout.form in _TRANSPOSED else weight


def apply_weight(x: Tensor, weight: Tensor, layout: WeightLayout) -> Tensor:
    """What a module of this layout, without bias, would compute if its weight were `weight`.

    A grouped convolution uses the one `weight` in every group, so that a factor [rank, in / groups, *kernel] gives
    [batch, groups * rank, ...].

    Args:
        x: The module's input; indices for an embedding.
        weight: [rows, in / groups, *kernel].

    Returns:
        The module's output shape with `rows` (times groups) features.
    """
    if layout.form == "embedding":
        rows = F.embedding(x, weight.mT)
        return rows if layout.scale == 1.0 else rows * layout.scale
    if layout.form == "conv":
        return _convolve(x, weight, layout)
    return F.linear(x, weight)


def mix_features(h: Tensor, weight: Tensor, layout: WeightLayout) -> Tensor:
    """Applies `weight` [out, rank] to the features of `h`, group by group: the second of two factors.

    Args:
        h: What `apply_weight` gave for a first factor of `rank` rows.
        weight: [out, rank].
    """
    if layout.form != "conv":
        return F.linear(h, weight)
    pointwise = weight.reshape(*weight.shape, *(1 for _ in layout.kernel))
    return _CONVOLUTIONS[len(layout.kernel) - 1](h, pointwise, groups=layout.groups)


def _convolve(x: Tensor, weight: Tensor, layout: WeightLayout) -> Tensor:
    axes = len(layout.kernel)
    padding = layout.padding
    if layout.padding_mode != "zeros":
        x = F.pad(x, _around(layout), mode=layout.padding_mode)
        padding = (0,) * axes
    if layout.groups > 1:
        weight = weight.repeat(layout.groups, *(1 for _ in weight.shape[1:]))
    convolve = _CONVOLUTIONS[axes - 1]
    return convolve(x, weight, None, layout.stride, padding, layout.dilation, layout.groups)  # pyright: ignore


def _around(layout: WeightLayout) -> list[int]:
    """Padding as torch's `pad` wants it: last axis first, both sides; "same" puts the odd one last, as torch does."""
    amounts: list[int] = []
    for axis in reversed(range(len(layout.kernel))):
        if layout.padding == "same":
            total = layout.dilation[axis] * (layout.kernel[axis] - 1)
            amounts += [total // 2, total - total // 2]
        elif layout.padding == "valid":
            amounts += [0, 0]
        else:
            amounts += [int(layout.padding[axis])] * 2
    return amounts
