"""HRA: a weight times a chain of Householder reflections (Yuan et al. 2024, arXiv:2405.17484)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit.points import Kind

_MAX_RANK = 2**12


class HRAModule(ak.AdapterModule):
    """`W H_1 ... H_r x + b`, H_i = I - 2 u_i u_i^T with the normalized columns u_i of `u` [in * kernel, r].

    The chain is `I - U T U^T` with an upper triangle T (Schreiber and Van Loan 1989): one thin product instead of r
    reflections. With orthogonal columns, T is 2.
    """

    def __init__(self, point: ak.InjectionPoint, rank: int, orthogonal: bool) -> None:
        super().__init__()
        self.orthogonal, self.linear = orthogonal, point.is_linear
        self.u = nn.Parameter(_start(math.prod(point.shape[1:]), rank, orthogonal))

    def reflections(self) -> tuple[Tensor, Tensor]:
        """U [in * kernel, r] with columns of length 1, and `T U^T`; in float32 or wider."""
        u = self.u.to(torch.promote_types(self.u.dtype, torch.float32))  # as solving asks
        if self.orthogonal:
            q = torch.linalg.qr(u).Q
            return q, 2 * q.mT
        u = u / u.norm(dim=0)
        half = torch.eye(u.shape[1], dtype=u.dtype, device=u.device) / 2
        return u, torch.linalg.solve_triangular(half + (u.mT @ u).triu(1), u.mT, upper=True)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(self._reflected(x)) if self.linear else super().forward(x, base)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._reflected(weight.flatten(1), back=True).view(weight.shape), bias

    def _reflected(self, features: Tensor, back: bool = False) -> Tensor:
        """The last axis of features times the chain, or times its transpose: as a weight takes it, or gives it."""
        u, tail = (each.to(features.dtype) for each in self.reflections())
        return features - (features @ u @ tail if back else features @ tail.mT @ u.mT)


def _start(size: int, rank: int, orthogonal: bool) -> Tensor:
    """Random columns; where their number is even, each comes twice, so that the reflections undo each other."""
    pairs = 2 if rank % 2 == 0 and not orthogonal else 1
    columns = nn.init.kaiming_uniform_(torch.empty(size, rank // pairs), a=math.sqrt(5))
    return columns.repeat_interleave(pairs, dim=1)


@dataclass(frozen=True)
class HRA(ak.AdapterConfig):
    """`W H_1 ... H_r`, orthogonal: rank numbers for each input. Of even rank it starts without any effect.

    Attributes:
        rank: The number of reflections.
        gram_schmidt: Make them orthogonal to each other, as the paper does at its limit; it then has an effect from
            the start.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    forms: ClassVar[frozenset[str] | None] = frozenset({"linear", "linear_t", "conv"})
    targets: str = "attention"
    rank: int = 8
    gram_schmidt: bool = False

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        """Whether the reflections come in pairs."""
        return self.rank % 2 == 0 and not self.gram_schmidt

    def problems(self) -> list[str]:
        return [] if 1 <= self.rank <= _MAX_RANK else [f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}"]

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        reason = super().accepts(point)
        width = math.prod(point.shape[1:])
        if reason is None and self.gram_schmidt and self.rank > width:
            return f"there are no {self.rank} orthogonal reflections of {width} inputs: set rank to {width} at most"
        return reason

    def alike(self, point: ak.InjectionPoint) -> tuple[Hashable, ...]:
        return (point.shape, point.is_linear, self.rank, self.gram_schmidt)

    def build(self, point: ak.InjectionPoint) -> HRAModule:
        return HRAModule(point, self.rank, self.gram_schmidt)
