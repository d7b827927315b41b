"""LoKr: an update that is a Kronecker product (Yeh et al. 2024, arXiv:2309.14859, section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.points import WeightPoint
from adapterkit_lycoris.dense import DenseConfig, DenseUpdate, kernel_of, wide


class LoKrModule(DenseUpdate):
    """`scale * kron(w1, w2)`: w1 [l, m], w2 [k, n, *kernel], with out = l k and in = m n.

    Each is a parameter or, where the rank is less than half of its longer side, a product of two, `lokr_wi_a` and
    `lokr_wi_b`; w1 only with `decompose_both`. In Tucker form w2 is `lokr_t2` [rank, rank, *kernel], `lokr_w2_a`
    [rank, k] and `lokr_w2_b` [rank, n].
    """

    def __init__(self, point: ak.InjectionPoint, config: LoKr) -> None:
        super().__init__(point, config.dropout, config.module_dropout)
        rank, kernel = config.rank, point.shape[2:]
        (rows1, rows2), (columns1, columns2) = config.sides(point)
        self.shape, self.kernel, self.scale = point.shape, kernel, config.scale
        first, second = config.products(rows1, columns1, rows2, columns2)
        if first:
            self.lokr_w1_a, self.lokr_w1_b = _random(rows1, rank), _random(rank, columns1)
        else:
            self.lokr_w1 = _random(rows1, columns1)
        self.tucker = config.tucker and bool(kernel_of(point))
        if not second:
            self.lokr_w2 = nn.Parameter(torch.zeros(rows2, columns2, *kernel))
        elif self.tucker:
            self.lokr_t2 = _random(rank, rank, *kernel)
            self.lokr_w2_a, self.lokr_w2_b = nn.Parameter(torch.zeros(rank, rows2)), _random(rank, columns2)
        else:
            self.lokr_w2_a = nn.Parameter(torch.zeros(rows2, rank))
            self.lokr_w2_b = _random(rank, columns2 * math.prod(kernel))

    def delta_weight(self) -> Tensor:
        w1, w2 = self._first(), self._second()
        blocks = torch.einsum("lm,knx->lkmnx", w1, w2.flatten(2) if self.kernel else w2.unsqueeze(-1))
        return (blocks * self.scale).reshape(self.shape)

    def _first(self) -> Tensor:
        return wide(self.lokr_w1) if hasattr(self, "lokr_w1") else wide(self.lokr_w1_a) @ wide(self.lokr_w1_b)

    def _second(self) -> Tensor:
        if hasattr(self, "lokr_w2"):
            return wide(self.lokr_w2)
        a, b = wide(self.lokr_w2_a), wide(self.lokr_w2_b)
        if hasattr(self, "lokr_t2"):
            return torch.einsum("pq...,pk,qn->kn...", wide(self.lokr_t2), a, b)
        product = a @ b
        return product.unflatten(1, (-1, *self.kernel)) if self.kernel else product


def factored(size: int, factor: int) -> tuple[int, int]:
    """Two factors of `size`, the smaller first: one is the largest divisor up to `factor`; -1 is the root."""
    limit = math.isqrt(size) if factor == -1 else min(factor, size)
    first = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return min(first, size // first), max(first, size // first)


def _random(*shape: int) -> nn.Parameter:
    """Uniform, as a layer with that weight starts."""
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)))


@dataclass(frozen=True)
class LoKr(DenseConfig):
    """`W + alpha / rank * kron(w1, w2)`, w2 of at most this rank.

    Attributes:
        factor: The smaller side of the Kronecker product is the largest divisor of the weight's side up to this; -1 for
            up to its root, which gives the fewest parameters.
        decompose_both: Give w1 factors of this rank too, where that saves parameters.
        tucker: Decompose the kernel of convolutions too.
        first: Rows and columns of w1, in the place of `factor`; None for what `factor` gives.
        low_rank: Whether w1 and w2 are products of this rank; None for where that saves parameters (w1 only with
            `decompose_both`).
    """

    factor: int = -1
    decompose_both: bool = False
    tucker: bool = False
    first: tuple[int, int] | None = None
    low_rank: tuple[bool, bool] | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        if self.factor != -1 and self.factor < 1:
            found.append(f"factor must be -1 or at least 1, not {self.factor!r}")
        if self.first is not None and not (len(self.first) == 2 and min(self.first) >= 1):
            found.append(f"first must be None or two sides of at least 1, not {self.first!r}")
        if self.low_rank is not None and len(self.low_rank) != 2:
            found.append(f"low_rank must be None or two of true and false, not {self.low_rank!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        sizes = zip(point.shape[:2], self.first or (1, 1), strict=False)
        if isinstance(point, WeightPoint) and any(size % own for size, own in sizes):
            return f"first is {self.first}, whose sides must divide those of the weight, {point.shape[:2]}"
        return super().accepts(point)

    def sides(self, point: ak.InjectionPoint) -> list[tuple[int, int]]:
        """The rows of w1 and w2, and their columns."""
        if self.first is None:
            return [factored(size, self.factor) for size in point.shape[:2]]
        return [(own, size // own) for size, own in zip(point.shape[:2], self.first, strict=True)]

    def products(self, rows1: int, columns1: int, rows2: int, columns2: int) -> tuple[bool, bool]:
        """Whether w1 and w2 are products."""
        if self.low_rank is not None:
            return self.low_rank
        first = self.decompose_both and self.rank < max(rows1, columns1) / 2
        return first, self.rank < max(rows2, columns2) / 2

    def update(self, point: ak.InjectionPoint) -> LoKrModule:
        return LoKrModule(point, self)
