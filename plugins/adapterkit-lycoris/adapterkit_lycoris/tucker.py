"""Tucker: LoRA for convolutions with a core for the kernel (Yeh et al. 2024, arXiv:2309.14859, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.kernels import low_rank
from adapterkit.points import WeightPoint
from adapterkit_lycoris.dense import DenseConfig, DenseUpdate, kernel_of


class TuckerModule(DenseUpdate):
    """`scale * up . mid . down`: down [rank, in / groups], mid [rank, rank, *kernel], up [out, rank]."""

    def __init__(self, point: ak.InjectionPoint, config: Tucker) -> None:
        super().__init__(point, config.dropout, config.module_dropout)
        self.scale, rank = config.scale, config.rank
        out, inputs, *kernel = point.shape
        self.lora_down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=5**0.5))
        self.lora_mid = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, rank, *kernel), a=5**0.5))
        self.lora_up = nn.Parameter(torch.zeros(out, rank))

    def product(self) -> ak.Factors:
        """Down and mid in one, [rank, in / groups, *kernel], and up."""
        a = torch.einsum("pq...,qi->pi...", self.lora_mid, self.lora_down)
        return ak.Factors(a, self.lora_up, self.layout, self.scale)

    def factors(self) -> ak.Factors | None:
        return None if self.dropping else self.product()

    def effect(self, x: Tensor) -> Tensor:
        return low_rank.update(x, self.product())

    def delta_weight(self) -> Tensor:
        return low_rank.dense(self.product())


@dataclass(frozen=True)
class Tucker(DenseConfig):
    """`W + alpha / rank * up . mid . down`, for convolutions whose kernel is larger than one."""

    targets: str = "res.{conv1,conv2}"

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if isinstance(point, WeightPoint) and not kernel_of(point):
            return f"Tucker decomposes a convolution's kernel, and this is a {point.form} without one; use LoRA"
        return super().accepts(point)

    def update(self, point: ak.InjectionPoint) -> TuckerModule:
        return TuckerModule(point, self)
