"""Whole differences: of a weight and its bias, and of a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit.kernels.weights import call_weight
from adapterkit.points import Kind, WeightPoint


class Difference(ak.AdapterModule):
    """`W + diff` and `bias + diff_b`, both starting at zero."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.layout = point.layout
        self.diff = nn.Parameter(torch.zeros(point.shape))
        self.diff_b = nn.Parameter(torch.zeros(point.out_features)) if self.layout.bias else None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        bias = None if self.diff_b is None else self.diff_b.to(y.dtype)
        return y + call_weight(x, self.diff.to(y.dtype), bias, self.layout)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own = bias if self.diff_b is None or bias is None else bias + self.diff_b.to(bias.dtype)
        return weight + self.diff.to(weight.dtype), own


@dataclass(frozen=True)
class FullDiff(ak.AdapterConfig):
    """A whole update of weights and their biases: `W + D` and `b + d`."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.in_span is not None and isinstance(point, WeightPoint) and point.layout.bias:
            return "its bias is another point's too"
        if point.cuts_groups:
            return "it acts on whole grouped convolutions"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> Difference:
        return Difference(point)


@dataclass(frozen=True)
class NormDiff(ak.AdapterConfig):
    """An update of norms' gains and shifts: `gain + d` and `shift + e`."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"norm"})
    targets: str = "norm"

    def build(self, point: ak.InjectionPoint) -> Difference:
        return Difference(point)
