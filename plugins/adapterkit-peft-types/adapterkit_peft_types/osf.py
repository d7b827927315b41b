"""OSF: a weight's smaller singular values are learnt, its larger ones stay (Nayak et al. 2025, arXiv:2504.07097)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.points import Kind, WeightLayout


class OSFModule(ak.AdditiveModule):
    """`W + U diag(S) V - U0 diag(S0) V0`: the second product is the part of W with its smaller singular values.

    U [out, r], S [r] and V [r, in / groups * kernel] are learnt, from U0, S0 and V0 on. Gradients of U and V lose what
    lies in the span of the larger singular values' vectors: they are projected by `U0 U0^T` and `V0^T V0`; on the
    weight's longer side by `1 - K K^T`, with these vectors in K.

    Args:
        point: Where.
        kept: How many singular values are left alone.
    """

    def __init__(self, point: ak.InjectionPoint, kept: int) -> None:
        super().__init__()
        out, *self.rest = point.shape
        width = math.prod(self.rest)
        rank, self.layout = min(out, width) - kept, point.layout
        self.U, self.S = nn.Parameter(torch.zeros(out, rank)), nn.Parameter(torch.zeros(rank))
        self.V = nn.Parameter(torch.zeros(rank, width))
        for name, shape in (("U", (out, rank)), ("S", (rank,)), ("V", (rank, width))):
            self.register_buffer(f"{name}0", torch.zeros(shape))
        self.register_buffer("K", None if out == width else torch.zeros(kept, max(out, width)))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: the parts of the weight's singular value decomposition."""
        for name, value in decomposed(weight, min(len(self.U), self.V.shape[1]) - len(self.S)).items():
            if name != "K":
                cast("Tensor", getattr(self, f"{name}0")).copy_(value)
            if getattr(self, name) is not None:
                cast("Tensor", getattr(self, name)).copy_(value)

    def factors(self) -> ak.Factors:
        """See `AdditiveModule.factors`: exactly zero at the start."""
        u0, s0, v0 = (cast("Tensor", one) for one in (self.U0, self.S0, self.V0))
        longer = len(u0) > v0.shape[1]
        u = self._directed(self.U.mT, u0.mT, longer).mT
        v = self._directed(self.V, v0, not longer)
        factors = update(u, self.S, v, u0, s0, v0, self.layout)
        return ak.Factors(factors.A.unflatten(1, self.rest), factors.B, self.layout)

    def _directed(self, rows: Tensor, start: Tensor, longer: bool) -> Tensor:
        """The rows, with gradients in the rows' own subspace alone."""
        if not (rows.requires_grad and torch.is_grad_enabled()):
            return rows
        step = rows - rows.detach()  # zero, with a gradient
        if longer and self.K is not None:
            kept = cast("Tensor", self.K)
            return rows.detach() + (step - step @ kept.mT @ kept)
        return rows.detach() + step @ start.mT @ start


def update(u: Tensor, s: Tensor, v: Tensor, u0: Tensor, s0: Tensor, v0: Tensor, layout: WeightLayout) -> ak.Factors:
    """`U diag(S) V - U0 diag(S0) V0` as factors of twice the rank: exactly zero where nothing has moved."""
    return ak.Factors(torch.cat([v, v - v0]), torch.cat([u * s - u0 * s0, u0 * s0], dim=1), layout)


def decomposed(weight: Tensor, kept: int) -> dict[str, Tensor]:
    """U, S and V of a weight's smaller singular values, and K, the longer vectors of the `kept` larger ones.

    Args:
        weight: [out, in / groups, *kernel].
        kept: How many are larger.
    """
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    larger = u[:, :kept].mT if len(u) > vh.shape[1] else vh[:kept]
    found = {"U": u[:, kept:], "S": s[kept:], "V": vh[kept:], "K": larger}
    return {name: tensor.contiguous() for name, tensor in found.items()}


@dataclass(frozen=True)
class OSF(ak.AdapterConfig):
    """The weight's smaller singular values and their vectors are learnt, the larger ones stay (section 3).

    So what the weight knows best is not lost. Gradients are projected, as the paper has it.

    Attributes:
        kept: How many of the singular values stay, or, less than 1, which part of them; None for a half, rounded down.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    exact_gradients: ClassVar[bool] = False  # they are projected
    targets: str = "attention"
    kept: int | float | None = None

    def problems(self) -> list[str]:
        if self.kept is not None and not self.kept > 0:
            return [f"kept must be None, a number of singular values or a part of 1, not {self.kept!r}"]
        if isinstance(self.kept, float) and not self.kept < 1:
            return [f"kept must be a whole number, or less than 1, not {self.kept!r}"]
        return []

    def kept_at(self, point: ak.InjectionPoint) -> int:
        """How many singular values stay at a point."""
        every = min(point.shape[0], math.prod(point.shape[1:]))
        if self.kept is None:
            return every // 2
        return self.kept if isinstance(self.kept, int) else int(every * self.kept)

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.cuts_groups:
            return "OSF acts on whole grouped convolutions"
        if point.kind == "weight":
            every = min(point.shape[0], math.prod(point.shape[1:]))
            if not 0 < self.kept_at(point) < every:
                return f"it has {every} singular values, of which kept={self.kept} leaves none, or all, to be learnt"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> OSFModule:
        return OSFModule(point, self.kept_at(point))
