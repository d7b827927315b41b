"""PSOFT: a rotation inside of a weight's principal subspace (Wu et al. 2025, arXiv:2505.11235)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_peft_types.ranked import Ranked, Thinned

_MAX_SEED, _MAX_TERMS, _MAX_ITERATIONS = 2**63 - 1, 64, 1000
_MORE = 8  # singular values beside those that are taken, from which these are told apart


class PSOFTModule(Thinned):
    """`W + B (R - 1) A`: `B A` is the part of W with its largest singular values, fixed; R [r, r] is learnt.

    R is `diag(after) C diag(before)`, with C the Cayley transform of the skew matrix whose upper triangle is `turn`,
    row by row; or, where it is not orthogonal, `turn` itself.
    """

    def __init__(self, point: ak.InjectionPoint, config: PSOFT) -> None:
        super().__init__(point, config.dropout)
        out, *rest = point.shape
        rank, self.config = config.rank, config
        start = torch.zeros(rank * (rank - 1) // 2) if config.orthogonal else torch.eye(rank)
        self.turn = nn.Parameter(start)
        self.after = nn.Parameter(torch.ones(rank)) if config.scale_after else None
        self.before = nn.Parameter(torch.ones(rank)) if config.scale_before else None
        self.register_buffer("A", torch.zeros(rank, *rest))
        self.register_buffer("B", torch.zeros(out, rank))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: the weight's largest singular values and their vectors."""
        for name, value in zip("AB", self.config.principal(weight), strict=True):
            kept = cast("Tensor", getattr(self, name))
            kept.copy_(value.view_as(kept))

    def rotation(self) -> Tensor:
        """R."""
        turn = self.turn.to(torch.promote_types(self.turn.dtype, torch.float32))
        r = self._orthogonal(turn) if self.config.orthogonal else turn
        r = r if self.after is None else self.after.to(r.dtype)[:, None] * r
        return r if self.before is None else r * self.before.to(r.dtype)

    def _orthogonal(self, turn: Tensor) -> Tensor:
        rank, terms, bound = self.config.rank, self.config.terms, self.config.bound
        rows, columns = torch.triu_indices(rank, rank, 1, device=turn.device)
        upper = turn.new_zeros(rank, rank).index_put((rows, columns), turn)
        q, identity = upper - upper.mT, torch.eye(rank, dtype=turn.dtype, device=turn.device)
        if terms is None:
            return torch.linalg.solve(identity - q, identity + q, left=False)
        if bound is not None:
            norm = torch.linalg.vector_norm(q)
            q = q * torch.where(norm > bound, bound / norm.clamp_min(1e-12), torch.ones_like(norm))
        total, power = identity, identity
        for i in range(1, terms):  # (1 + Q)(1 + Q + Q^2 + ...): every power twice, but for the first and the last
            power = power @ q
            total = total + (power if 1 < i == terms - 1 else 2 * power)
        return total

    def product(self) -> ak.Factors:
        r = self.rotation()
        less = (r - torch.eye(len(r), dtype=r.dtype, device=r.device)).to(self.turn.dtype)
        return ak.Factors(cast("Tensor", self.A), cast("Tensor", self.B) @ less, self.layout)


@dataclass(frozen=True)
class PSOFT(Ranked):
    """`W_rest + B R A`, with W's largest singular values in `B A`, and R an orthogonal matrix of few numbers (eq. 5).

    Files hold A and B.

    Attributes:
        rank: Of the subspace; the smaller side of the weight at most.
        balanced: Whether A and B have the roots of the singular values each, instead of B all of them: R then turns
            what is scaled already.
        orthogonal: Whether R is orthogonal, but for its scales; otherwise it is any matrix.
        scale_before, scale_after: Whether R's columns, and its rows, have factors that are learnt.
        terms: Of the sum that stands for the inverse in Cayley's transform; None for the inverse itself.
        bound: On the norm of the skew matrix, for that sum; None for none.
        iterations: Of a randomised decomposition of the weight; None for the exact one.
        seed: Of the randomised decomposition.
    """

    rank: int = 32
    balanced: bool = False
    orthogonal: bool = True
    scale_before: bool = True
    scale_after: bool = True
    terms: int | None = None
    bound: float | None = None
    iterations: int | None = None
    seed: int = 0

    def problems(self) -> list[str]:
        found = super().problems()
        if self.terms is not None and not 1 <= self.terms <= _MAX_TERMS:
            found.append(f"terms must be None or from 1 to {_MAX_TERMS}, not {self.terms!r}")
        if self.bound is not None and not (self.terms is not None and 0 < self.bound < 1):
            found.append(f"bound must be None, or with terms more than 0 and less than 1, not {self.bound!r}")
        if self.iterations is not None and not 0 <= self.iterations <= _MAX_ITERATIONS:
            found.append(f"iterations must be None or from 0 to {_MAX_ITERATIONS}, not {self.iterations!r}")
        if not 0 <= self.seed <= _MAX_SEED:
            found.append(f"seed must be from 0 to {_MAX_SEED}, not {self.seed!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.kind == "weight" and self.rank > (most := min(point.shape[0], math.prod(point.shape[1:]))):
            return f"PSOFT takes its rank from the weight, which has {most}, and {self.rank} is asked for"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> PSOFTModule:
        return PSOFTModule(point, self)

    def principal(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A [rank, in / groups * kernel] and B [out, rank] of a weight [out, in / groups, *kernel]."""
        matrix = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
        if self.iterations is None:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            u, s, vh = _refined(matrix, u, vh, self.rank + _MORE)
        else:
            with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
                torch.manual_seed(self.seed)
                u, s, v = torch.svd_lowrank(matrix, q=self.rank, niter=self.iterations)
            vh = v.mT
        u, s, vh = u[:, : self.rank], s[: self.rank], vh[: self.rank]
        if self.balanced:
            return s.sqrt()[:, None] * vh, u * s.sqrt()
        return vh, u * s


def _refined(matrix: Tensor, u: Tensor, vh: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular values and vectors, told apart in float64, with the signs that they had.

    In float32 vectors of values that are close are mixed, which R does not forgive: by more than 1e-5 in small layers.
    """
    left, right = (torch.linalg.qr(one[:, :count].double())[0] for one in (u, vh.mT))
    a, s, b = torch.linalg.svd(left.mT @ matrix.double() @ right)
    left, right = left @ a, right @ b.mT
    signs = (left * u[:, :count]).sum(0).sign()
    return (left * signs).to(u.dtype), s.to(u.dtype), (right * signs).mT.to(u.dtype)
