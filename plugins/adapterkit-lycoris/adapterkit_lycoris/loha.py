"""LoHa: the elementwise product of two low-rank updates (Hyeon-Woo et al. 2022, arXiv:2108.06098)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lycoris.dense import DenseConfig, DenseUpdate, kernel_of, wide


class LoHaModule(DenseUpdate):
    """`scale * (w1_a w1_b) * (w2_a w2_b)`, elementwise between the products.

    wi_a is [out, rank] and wi_b [rank, rest], rest being all other axes of the weight in one. In Tucker form wi_a is
    [rank, out], wi_b [rank, in] and there is a core ti [rank, rank, *kernel].
    """

    def __init__(self, point: ak.InjectionPoint, config: LoHa) -> None:
        super().__init__(point, config.dropout, config.module_dropout)
        self.shape, self.scale, rank = point.shape, config.scale, config.rank
        out, *rest = point.shape
        self.tucker = config.tucker and bool(kernel_of(point))
        for i in (1, 2):
            up, down = ((rank, out), (rank, rest[0])) if self.tucker else ((out, rank), (rank, math.prod(rest)))
            if self.tucker:
                setattr(self, f"hada_t{i}", nn.Parameter(torch.randn(rank, rank, *rest[1:]) * 0.1))
            setattr(self, f"hada_w{i}_b", nn.Parameter(torch.randn(down)))
            setattr(self, f"hada_w{i}_a", nn.Parameter(torch.randn(up) * 0.1 if i == 1 else torch.zeros(up)))

    def delta_weight(self) -> Tensor:
        return (self._product(1) * self._product(2) * self.scale).view(self.shape)

    def _product(self, i: int) -> Tensor:
        a, b = (wide(getattr(self, f"hada_w{i}_{end}")) for end in "ab")
        if not self.tucker:
            return a @ b
        return torch.einsum("pq...,po,qi->oi...", wide(getattr(self, f"hada_t{i}")), a, b)


@dataclass(frozen=True)
class LoHa(DenseConfig):
    """`W + alpha / rank * (A1 B1) * (A2 B2)`: of rank up to rank^2, with the parameters of two LoRAs.

    Attributes:
        tucker: Decompose convolutions with a kernel in their kernel too.
    """

    tucker: bool = False

    def update(self, point: ak.InjectionPoint) -> LoHaModule:
        return LoHaModule(point, self)
