"""(IA)3: one learnt factor for every feature that a projection gives, or takes (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit.points import Kind, WeightPoint
from adapterkit.selectors import Selector


class ScaledOutput(ak.AdapterModule):
    """`y = scale * base(x)`: the bias is scaled too.

    Args:
        point: Where; `scale` is [out].
    """

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.axis = point.feature_axis
        self.scale = nn.Parameter(torch.ones(point.out_features))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return y * _along(self.axis, self.scale, y)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Every row, and its bias, times its factor."""
        scale = self.scale.to(weight.dtype)
        rows = scale.reshape(-1, *(1 for _ in weight.shape[1:]))
        return weight * rows, None if bias is None else bias * scale


class ScaledInput(ak.AdapterModule):
    """`y = base(scale * x)`: the bias is not scaled.

    Args:
        point: Where; `scale` is [in].
    """

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.axis, self.groups = point.feature_axis, point.layout.groups
        self.scale = nn.Parameter(torch.ones(point.in_features))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x * _along(self.axis, self.scale, x))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Every column times its factor; in a grouped convolution each group of rows has columns of its own."""
        columns = self.scale.to(weight.dtype).reshape(self.groups, 1, -1, *(1 for _ in weight.shape[2:]))
        return (weight.unflatten(0, (self.groups, -1)) * columns).flatten(0, 1), bias


@dataclass(frozen=True)
class IA3(ak.AdapterConfig):
    """Factors on what projections give: `scale * (W x + b)`, or take: `W (scale * x) + b`. All factors start at 1.

    The paper's choice is the default: keys, values, and the hidden features that enter the feed-forward's last layer.
    Embeddings, convolutions and whole sublayers' outputs (which do not merge) can be scaled too. Several of them active
    at one point are a sum of their effects, not a product; `Stack` multiplies.

    Attributes:
        scale_input: Selector of those points at which the input is scaled instead of the output; None for nowhere.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight", "output"})
    targets: str = "attn.{k,v} mlp.down"
    scale_input: str | None = "mlp.down"

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if reason := super().accepts(point):
            return reason
        if not isinstance(point, WeightPoint):
            return "a sublayer's input cannot be scaled, only its output" if self._on_input(point) else None
        if point.form == "embedding" and self._on_input(point):
            return "IA3 scales features, and an embedding takes indices: leave it out of scale_input"
        if point.cuts_groups and self._on_input(point):
            return "IA3 scales the input of whole grouped convolutions only"
        return None

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        return ScaledInput(point) if self._on_input(point) else ScaledOutput(point)

    def problems(self) -> list[str]:
        if isinstance(self.scale_input, str):
            Selector(self.scale_input)
        return []

    def _on_input(self, point: ak.InjectionPoint) -> bool:
        return self.scale_input is not None and Selector(self.scale_input).matches(point)


def _along(axis: int, scale: Tensor, features: Tensor) -> Tensor:
    """The factors in the dtype of the features, shaped to multiply them along an axis counted from the last."""
    return scale.to(features.dtype).reshape(-1, *(1,) * (-1 - axis))
