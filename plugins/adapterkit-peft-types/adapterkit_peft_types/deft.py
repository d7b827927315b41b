"""DEFT: a subspace of a weight is taken out, and one put in (Kumar et al. 2025, arXiv:2509.22793). PaRa: taken out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base, WeightBase
from adapterkit.errors import did_you_mean
from adapterkit.kernels.weights import call_weight
from adapterkit_peft_types.ranked import Ranked

_MAX_SCALE = 1e4
_BASES = ("relu", "qr")


class DEFTModule(ak.AdapterModule):
    """`W + Q (scale R - K^T W)`: Q and K come from P [out, rank]; R [rank, in / groups * kernel] is put in, or nothing.

    Args:
        point: Where.
        config: The config.
        adds: Whether there is an R.
    """

    def __init__(self, point: ak.InjectionPoint, config: Ejected, adds: bool) -> None:
        super().__init__()
        out, *rest = point.shape
        rank, width = min(config.rank, out), math.prod(rest)
        self.layout, self.basis = point.layout, config.basis
        self.scale = 1.0 if config.alpha is None else config.alpha / rank
        self.P = nn.Parameter(torch.empty(out, rank).normal_(std=0.02))
        self.R = nn.Parameter(torch.zeros(rank, width)) if adds else None
        self.from_base = adds
        self.dropout = nn.Dropout(config.dropout) if config.dropout and adds and point.form != "embedding" else None

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: what is put in is what is taken out."""
        if self.R is not None:
            self.R.copy_(self.bases(weight.dtype)[1].mT @ weight.flatten(1) / self.scale)

    def bases(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Q and K, [out, rank] each."""
        p = self.P.to(torch.promote_types(dtype, torch.float32))
        if self.basis == "relu":
            return p.to(dtype), p.relu().to(dtype)
        q = torch.linalg.qr(p)[0].to(dtype)
        return q, q

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.dropout is None or not self.training or self.R is None:
            return super().forward(x, base)
        owner = cast("WeightBase", base)
        weight, bias = owner.weight, owner.bias
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        q, k = self.bases(wide.dtype)
        left = (wide.flatten(1) - q @ (k.mT @ wide.flatten(1))).view(weight.shape)
        put = (q @ (self.scale * self.R.to(wide.dtype))).view(weight.shape)
        y = owner.layer(x, left.to(weight.dtype), bias)
        return y + call_weight(self.dropout(x), put.to(weight.dtype), None, self.layout)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        (q, k), matrix = self.bases(weight.dtype), weight.flatten(1)
        change = -(k.mT @ matrix)
        if self.R is not None:
            change = change + self.scale * self.R.to(weight.dtype)
        return (matrix + q @ change).view(weight.shape), bias


@dataclass(frozen=True)
class Ejected(Ranked):
    """What `DEFT` and `PaRa` share.

    Attributes:
        rank: Of the subspace; a layer with fewer outputs has as many.
        basis: "qr" takes an orthogonal projection out; "relu" one that is none, with K the positive part of P.
        alpha: What is put in is scaled by alpha / rank; None means by 1.
    """

    basis: str = "relu"
    alpha: float | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        if self.basis not in _BASES:
            found.append(
                f"basis must be one of {', '.join(_BASES)}, not {self.basis!r}.{did_you_mean(self.basis, _BASES)}"
            )
        if self.alpha is not None and not 0 < abs(self.alpha) <= _MAX_SCALE * max(self.rank, 1):
            found.append(f"alpha must be None, or not 0 and within {_MAX_SCALE:g} times the rank, not {self.alpha!r}")
        return found


@dataclass(frozen=True)
class DEFT(Ejected):
    """`W - Q K^T W + scale Q R`: no effect at first, when R is what was taken out."""

    def build(self, point: ak.InjectionPoint) -> DEFTModule:
        return DEFTModule(point, self, adds=True)


@dataclass(frozen=True)
class PaRa(Ejected):
    """`W - Q K^T W` (Chen et al. 2024, arXiv:2406.05641): the weight has a lower rank, from the start."""

    neutral: ClassVar[bool] = False

    def problems(self) -> list[str]:
        idle = [f"{name} must be left alone: nothing is put in" for name in ("alpha", "dropout") if getattr(self, name)]
        return [*super().problems(), *idle]

    def build(self, point: ak.InjectionPoint) -> DEFTModule:
        return DEFTModule(point, self, adds=False)
