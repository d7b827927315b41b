"""Another rank for an adapter: the best there is of it, and what that loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.factors import Factors
from adapterkit.errors import NotMergeableError
from adapterkit.formats.parts import said_of, shared_of
from adapterkit.kernels import low_rank_algebra
from adapterkit.kernels.low_rank_algebra import Decomposition
from adapterkit.points import InjectionPoint, Points
from adapterkit.tools.effects import Effect, effect_of
from adapterkit.tools.made import Made, Update
from adapterkit.tools.modules import Placed, modules
from adapterkit.tools.ranks import RankRule, Spectrum


@dataclass(frozen=True)
class PointError:
    """What was done to the update of one point.

    Attributes:
        rank, before: Now, and before; `before` is the least dimension where the update was no low-rank one.
        norm: Of the update as it was.
        error: The norm of what was left out.
    """

    rank: int
    before: int
    norm: float
    error: float


@dataclass(frozen=True)
class Resized:
    """An adapter of other ranks.

    Attributes:
        checkpoint: The adapter.
        points: Id -> what was done there.
        kept: Ids of points that are as they were: what acts there is no matrix that is added to a weight.
    """

    checkpoint: Checkpoint
    points: Mapping[str, PointError]
    kept: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The norm of all that was left out, relative to that of the adapter's whole effect on weights."""
        whole = math.hypot(*(one.norm for one in self.points.values()))
        return math.hypot(*(one.error for one in self.points.values())) / whole if whole else 0.0


@torch.no_grad()
def resize(
    checkpoint: Checkpoint,
    rule: RankRule,
    points: Points | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    source: object = None,
) -> Resized:
    """The best approximation of an adapter by low-rank updates of the ranks that a rule gives.

    Whatever adds to a weight becomes LoRA, whatever its type was; of a type that is no low-rank update that is an
    approximation, as good as the rule says. A change of a bias is kept exactly.

    Args:
        checkpoint: The adapter.
        rule: Which ranks.
        points: The model's, where it is at hand; see `effects`.
        dtype: Of the new tensors.
        source: Named in errors.

    Raises:
        BaseNeededError: What the adapter does cannot be told without the model.
        CheckpointError: Its tensors are not those that its type asks for.
    """
    made, found = Made(dtype, source), dict[str, PointError]()
    said, kept = said_of(checkpoint), list[str]()
    for placed in modules(checkpoint, points, source):
        effect = _matrix(placed, points, source)
        if effect is None:
            kept.append(placed.key)
            made.keep(placed.key, said[placed.key])
            continue
        if not isinstance(effect.weight, Factors):
            placed.require_shape(source)
        factors, found[placed.key] = resized(effect, rule, effect.rank)
        made.add(Update(placed.key, factors, effect.bias))
    shared = shared_of(checkpoint) if kept else {}
    return Resized(made.checkpoint([checkpoint], checkpoint.metadata, shared), found, tuple(kept))


def _matrix(placed: Placed, points: Points | None, source: object) -> Effect | None:
    """What is added to a weight that has rows and columns; None where there is none."""
    try:
        effect = effect_of(placed, points, source)
    except NotMergeableError:
        return None
    return effect if effect.weight is not None and len(effect.point.shape) > 1 else None


def resized(effect: Effect, rule: RankRule, before: int) -> tuple[Factors, PointError]:
    """The best low-rank update by a rule of what is added to a weight, and what that loses.

    Args:
        effect: What is added to a weight that has rows and columns.
        rule: Which rank.
        before: The rank that the report tells.
    """
    point = effect.point
    if isinstance(effect.weight, Factors):
        whole = low_rank_algebra.decomposed(effect.weight)
        total = float(whole.S.double().square().sum())
        found = whole.cut(rule.of(whole.S, total, point) or len(whole.S))
        error = float(whole.S[len(found.S) :].double().norm())
    else:
        matrix = effect.dense.flatten(1)
        found = truncate(matrix, rule, point)
        total, error = _norm(matrix) ** 2, low_rank_algebra.residual(matrix, found)
    factors = found.factors(point.shape, point.layout)
    return factors, PointError(factors.rank, before, total**0.5, error)


def truncate(matrix: Tensor, rule: RankRule, point: InjectionPoint) -> Decomposition:
    """As much of a dense matrix as a rule asks for."""
    most = rule.most(point)
    if rule.fixed and most is not None:
        return low_rank_algebra.truncated(matrix, most)
    return low_rank_algebra.truncated_until(matrix, lambda values, total: rule.of(values, total, point))


def spectra(checkpoint: Checkpoint, points: Points | None = None, source: object = None) -> list[Spectrum]:
    """The singular values of what an adapter adds to each weight that has rows and columns; see `ranks`.

    Errors as for `resize`.
    """
    found = (_matrix(placed, points, source) for placed in modules(checkpoint, points, source))
    return [Spectrum(one.point, one.singular_values, one.rank) for one in found if one is not None]


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
