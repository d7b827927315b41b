"""BEFT: a learnt vector beside the bias of value projections (Huang et al. 2025, arXiv:2509.15974)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit.points import Kind, WeightPoint


class BEFTModule(ak.AdapterModule):
    """`base(x) + bias`: bias [out] starts at zero."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.axis = point.feature_axis
        self.bias = nn.Parameter(torch.zeros(point.out_features))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return y + self.bias.to(y.dtype).reshape(-1, *(1,) * (-1 - self.axis))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own = self.bias.to(weight.dtype)
        return weight, own if bias is None else bias + own


@dataclass(frozen=True)
class BEFT(ak.AdapterConfig):
    """`W x + b + c` with one learnt vector c for each layer, by the paper's choice value projections.

    Merging needs a layer that has a bias, or can take one.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attn.v"

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if not isinstance(point, WeightPoint):
            return super().accepts(point)
        if point.in_span is not None:
            return "its output is a part of a sum, whose bias is another point's too"
        if point.form == "embedding":
            return "BEFT changes a bias, and an embedding has none: use Trainable or LoRA"
        if point.is_read and not point.layout.bias:
            return "the model reads this weight, and has no bias beside it"
        return super().accepts(point)

    def alike(self, point: ak.InjectionPoint) -> tuple[Hashable, ...]:
        return (point.out_features, point.feature_axis)

    def build(self, point: ak.InjectionPoint) -> BEFTModule:
        return BEFTModule(point)
