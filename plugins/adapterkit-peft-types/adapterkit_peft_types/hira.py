"""HiRA: a weight times a low-rank one, element by element (Huang et al. 2025, openreview.net/forum?id=TwJrTz9cRS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base, WeightBase
from adapterkit.kernels import low_rank
from adapterkit.kernels.weights import call_weight
from adapterkit_peft_types.ranked import Ranked


class HiRAModule(ak.AdapterModule):
    """`W + W * (B A)`: A [rank, in / groups, *kernel], B [out, rank]."""

    def __init__(self, point: ak.InjectionPoint, rank: int, dropout: float) -> None:
        super().__init__()
        out, *rest = point.shape
        self.layout = point.layout
        self.A, self.B = nn.Parameter(torch.zeros(rank, *rest)), nn.Parameter(torch.zeros(out, rank))
        self.dropout = nn.Dropout(dropout) if dropout else None
        if self.layout.form == "embedding":
            nn.init.normal_(self.B)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.dropout is None or not self.training or self.layout.form == "embedding":
            return super().forward(x, base)
        weight = cast("WeightBase", base).weight
        update = weight * self.modulation().to(weight.dtype)
        return base(x) + call_weight(self.dropout(x), update, None, self.layout)

    def modulation(self) -> Tensor:
        """`B A`."""
        return low_rank.dense(ak.Factors(self.A, self.B, self.layout))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + weight * self.modulation().to(weight.dtype), bias


@dataclass(frozen=True)
class HiRA(Ranked):
    """`W + W * (B A)` (eq. 3): the update has as high a rank as the weight, from a low-rank one's parameters."""

    rank: int = 32

    def build(self, point: ak.InjectionPoint) -> HiRAModule:
        return HiRAModule(point, self.rank, self.dropout)
