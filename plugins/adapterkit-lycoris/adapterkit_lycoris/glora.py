"""GLoRA as LyCORIS has it: a low-rank update, and one of the inputs that the weight sees (arXiv:2306.07967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base, WeightBase
from adapterkit.kernels.weights import call_weight
from adapterkit.points import Kind, WeightPoint


class GLoRAModule(ak.AdapterModule):
    """`W' = W + scale (W a1 a2 + b1 b2)`, a1 a2 acting on input features at every place of a kernel.

    a1 is [in / groups, rank], a2 [rank, in / groups], b1 [out, rank] and b2 [rank, in / groups, *kernel].
    """

    def __init__(self, point: ak.InjectionPoint, rank: int, scale: float) -> None:
        super().__init__()
        self.layout, self.scale = point.layout, scale
        out, width, *kernel = point.shape
        self.a1 = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(width, rank), a=5**0.5))
        self.a2 = nn.Parameter(torch.zeros(rank, width))
        self.b1 = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(out, rank), a=5**0.5))
        self.b2 = nn.Parameter(torch.zeros(rank, width, *kernel))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self.layout.kernel:
            a1, a2, b1, b2 = (one.to(x.dtype).mT for one in (self.a1, self.a2, self.b1, self.b2))
            return base(x + self.scale * (x @ a2 @ a1)) + self.scale * (x @ b2 @ b1)
        frozen = cast("WeightBase", base)
        weight, bias = self.merged(frozen.weight, frozen.bias)
        return call_weight(x, weight.to(x.dtype), bias, self.layout)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`."""
        a1, a2, b1, b2 = (one.to(weight.dtype) for one in (self.a1, self.a2, self.b1, self.b2))
        changed = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
        return weight + self.scale * (changed + (b1 @ b2.flatten(1)).view_as(weight)), bias


@dataclass(frozen=True)
class GLoRA(ak.AdapterConfig):
    """`W + alpha / rank (W A + B)`, A and B of this rank. It has no effect at first.

    Attributes:
        rank: Of both.
        alpha: None means the rank.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    rank: int = 8
    alpha: float | None = None

    def problems(self) -> list[str]:
        if not 1 <= self.rank <= 2**12:
            return [f"rank must be from 1 to {2**12}, not {self.rank!r}"]
        return []

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if isinstance(point, WeightPoint) and (point.cuts_groups or point.form == "embedding"):
            return "it needs input features, all those of a group"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> GLoRAModule:
        return GLoRAModule(point, self.rank, 1.0 if self.alpha is None else self.alpha / self.rank)
