"""DeLoRA: a low-rank update whose directions and whose size are learnt apart (Bini et al. 2025, arXiv:2503.18225)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.points import WeightLayout
from adapterkit_peft_types.ranked import Ranked, Thinned

_MAX_BOUND, _LEAST_NORM = 1e6, 1e-4


class DeLoRAModule(Thinned):
    """`bound / r sum_i b_i a_i^T / (|b_i| |a_i|) diag(norms)`.

    A [r, in / groups, *kernel] and B [out, r] are the directions, bound [1] the size, and norms [in / groups, *kernel]
    those of the base's columns, which are kept as they were at the start.

    Args:
        point: Where.
        rank: r.
        bound: Start value.
        dropout: Of the input, in training.
    """

    def __init__(self, point: ak.InjectionPoint, rank: int, bound: float, dropout: float) -> None:
        super().__init__(point, dropout)
        out, *rest = point.shape
        self.A, self.B = nn.Parameter(torch.empty(rank, *rest)), nn.Parameter(torch.zeros(out, rank))
        self.bound = nn.Parameter(torch.full((1,), float(bound)))
        self.register_buffer("norms", torch.ones(rest))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: the norms of the weight's columns."""
        cast("Tensor", self.norms).copy_(torch.linalg.vector_norm(weight, dim=0))

    def product(self) -> ak.Factors:
        """The update, dropout aside."""
        return update(self.A, self.B, self.bound, cast("Tensor", self.norms), self.layout)


def update(a: Tensor, b: Tensor, bound: Tensor, norms: Tensor, layout: WeightLayout) -> ak.Factors:
    """The update of `DeLoRAModule` from its tensors."""
    wide = torch.promote_types(a.dtype, torch.float32)
    rows = torch.linalg.vector_norm(a.flatten(1), dim=1, dtype=wide).clamp_min(_LEAST_NORM)
    columns = torch.linalg.vector_norm(b, dim=0, dtype=wide).clamp_min(_LEAST_NORM)
    sizes = (bound / len(a) / (rows * columns)).to(b.dtype)
    return ak.Factors(a * norms.to(a.dtype), b * sizes, layout)


@dataclass(frozen=True)
class DeLoRA(Ranked):
    """`W + bound / r B X A diag(norms of W's columns)`, with X the inverse norms of A's rows and B's columns (eq. 8).

    The update's size is at most the bound, however long training goes on. B starts at zero, so the update does.

    Attributes:
        bound: Where the learnt bound starts; the paper's lambda.
    """

    bound: float = 15.0

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0 < abs(self.bound) <= _MAX_BOUND:
            found.append(f"bound must not be 0, where nothing trains, and within {_MAX_BOUND:g}, not {self.bound!r}")
        return found

    def build(self, point: ak.InjectionPoint) -> DeLoRAModule:
        return DeLoRAModule(point, self.rank, self.bound, self.dropout)
