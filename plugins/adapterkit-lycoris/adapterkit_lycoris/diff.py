"""Whole differences: of a weight and its bias, and of a norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit.kernels.weights import call_weight
from adapterkit.points import Kind, WeightPoint

PARTS = ("all", "weight", "bias")


class Difference(ak.AdapterModule):
    """`W + diff` and `bias + diff_b`, both starting at zero; only one of them where `part` says so."""

    def __init__(self, point: ak.InjectionPoint, part: str = "all") -> None:
        super().__init__()
        self.layout, self.axis = point.layout, point.feature_axis
        self.diff = nn.Parameter(torch.zeros(point.shape)) if part != "bias" else None
        has_bias = part == "bias" or (part == "all" and self.layout.bias)
        self.diff_b = nn.Parameter(torch.zeros(point.out_features)) if has_bias else None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        bias = None if self.diff_b is None else self.diff_b.to(y.dtype)
        if self.diff is None:
            return y if bias is None else y + bias.view(-1, *(1,) * (-1 - self.axis))
        return y + call_weight(x, self.diff.to(y.dtype), bias, self.layout)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        changed = weight if self.diff is None else weight + self.diff.to(weight.dtype)
        if self.diff_b is None:
            return changed, bias
        own = self.diff_b.to(weight.dtype)
        return changed, own if bias is None else bias + own


@dataclass(frozen=True)
class FullDiff(ak.AdapterConfig):
    """A whole update of weights and their biases: `W + D` and `b + d`.

    Attributes:
        part: "weight", "bias" or "all".
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    part: str = "all"

    def problems(self) -> list[str]:
        return [] if self.part in PARTS else [f"part must be one of {', '.join(PARTS)}, not {self.part!r}"]

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        shares_bias = point.in_span is not None and isinstance(point, WeightPoint) and point.layout.bias
        if shares_bias and self.part != "weight":
            return "its bias is another point's too"
        if point.cuts_groups:
            return "it acts on whole grouped convolutions"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> Difference:
        return Difference(point, self.part)


@dataclass(frozen=True)
class NormDiff(ak.AdapterConfig):
    """An update of norms' gains and shifts: `gain + d` and `shift + e`.

    Attributes:
        part: "weight", "bias" or "all".
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"norm"})
    targets: str = "norm"
    part: str = "all"

    def problems(self) -> list[str]:
        return [] if self.part in PARTS else [f"part must be one of {', '.join(PARTS)}, not {self.part!r}"]

    def narrow(self, points: Sequence[ak.InjectionPoint]) -> Sequence[ak.InjectionPoint]:
        """See `AdapterConfig.narrow`: for shifts, the norms that have one."""
        return [point for point in points if point.layout.bias or self.part != "bias"]

    def build(self, point: ak.InjectionPoint) -> Difference:
        return Difference(point, self.part)
