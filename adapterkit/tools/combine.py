"""Several adapters as one: their weighted sum, exactly, or a merge that keeps them from disturbing each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.factors import Factors
from adapterkit.contract.fields import is_number
from adapterkit.errors import ConfigError, ShapeMismatchError, did_you_mean, shown
from adapterkit.kernels import low_rank_algebra
from adapterkit.points import InjectionPoint, Points
from adapterkit.selectors import Table
from adapterkit.tools import sparse
from adapterkit.tools.effects import Effect, effect_of
from adapterkit.tools.made import Made, Update
from adapterkit.tools.modules import Placed, base_needed, modules
from adapterkit.tools.ranks import RankRule
from adapterkit.tools.resize import PointError, Resized, resized

SUM = "sum"
METHODS = (SUM, *sparse.METHODS)


@dataclass(frozen=True)
class Share:
    """One of the adapters that are combined.

    Attributes:
        checkpoint: The adapter.
        weight: Factor on all that it adds.
        blocks: Selector -> further factor on the points that it matches; the last match wins. See
            `adapterkit.selectors`.
        name: What it is called in errors, and in the metadata of what comes out.
    """

    checkpoint: Checkpoint
    weight: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)
    name: str = ""


@torch.no_grad()
def combine(
    shares: Sequence[Share],
    method: str = SUM,
    *,
    rule: RankRule | None = None,
    density: float = 0.5,
    seed: int = 0,
    points: Points | None = None,
    dtype: torch.dtype = torch.float32,
) -> Resized:
    """One adapter of several, of whatever types and ranks, that add something to weights.

        sum        sum_i w_i D_i: exact, since the factors are put side by side, until a rule asks for less
        magnitude  each keeps its largest entries; their sum
        ties       the same, and in each place the mean of those that have the sign of the sum (arXiv:2306.01708)
        dare       each keeps entries at random, scaled up; their sum (arXiv:2311.03099)
        dare_ties  the same, and in each place the mean of those that have the sign of the sum

    All but the first are of full rank, and what is made of them has the rank that a rule gives: by default the sum of
    the ranks of those that are combined.

    Args:
        shares: The adapters.
        method: One of those above.
        rule: The ranks of what comes out.
        density: The part of the entries that each keeps, for all methods but the sum.
        seed: Of what DARE draws.
        points: The model's, where it is at hand; see `effects`.
        dtype: Of the new tensors.

    Returns:
        The adapter, with what was left out of the exact result.

    Raises:
        ConfigError: There is nothing to combine, an unknown method, or no rank is given where one is needed.
        BaseMismatchError: They are for different models.
        BaseNeededError: What one does cannot be told without the model.
        NotMergeableError: One does something else than to change weights.
    """
    _check(shares, method, density)
    made, found = Made(dtype), dict[str, PointError]()
    factors = [_Factor(share) for share in shares]
    for key, placed in _by_point(shares, points).items():
        own = [effect_of(one, points, shares[i].name or None) for i, one in placed]
        weights = [factors[i].at(effect.point) for (i, _), effect in zip(placed, own, strict=True)]
        together = _Together.of(own, weights, f"{seed}/{key}")
        if len(together.point.shape) == 1:
            made.add(_plain(together, points, method, density))
            continue
        low_rank = None
        for (i, one), effect in zip(placed, own, strict=True):
            if not isinstance(effect.weight, Factors | None):
                one.require_shape(shares[i].name or None)
        if any(effect.weight is not None for effect in own):
            low_rank, found[key] = _matrix(together, method, rule, density)
        made.add(Update(key, low_rank, together.bias(method, density)))
    for factor in factors:
        factor.check(points)
    return Resized(made.checkpoint([share.checkpoint for share in shares], _metadata(shares, method)), found)


class _Factor:
    """The weight of an adapter at each point."""

    def __init__(self, share: Share) -> None:
        self._share, self._table, self._seen = share, Table(share.blocks), list[InjectionPoint]()

    def at(self, point: InjectionPoint) -> float:
        self._seen.append(point)
        return self._share.weight * self._table.at(point, 1.0)

    def check(self, points: Points | None) -> None:
        """Raises ConfigError for a factor that no point has received: it is a typo."""
        if idle := self._table.idle(self._seen):
            own = "" if points else ", whose roles the model tells: --base MODEL, or points=ak.points(model)"
            problem = f"{shown(idle[0])} matches none of its points{own}"
            raise ConfigError([problem], f"blocks of {self._share.name or 'a share'}")


def _by_point(shares: Sequence[Share], points: Points | None) -> dict[str, list[tuple[int, Placed]]]:
    """Point id -> what acts there, each with the place of its adapter."""
    found: dict[str, list[tuple[int, Placed]]] = {}
    for i, share in enumerate(shares):
        for placed in modules(share.checkpoint, points, share.name or None):
            found.setdefault(placed.key, []).append((i, placed))
    return found


@dataclass(frozen=True)
class _Together:
    """What several adapters add at one point, with the weight of each."""

    point: InjectionPoint
    effects: Sequence[Effect]
    weights: Sequence[float]
    seed: str

    @staticmethod
    def of(effects: Sequence[Effect], weights: Sequence[float], seed: str) -> _Together:
        """At the point of the one whose tensors tell the most of its shape.

        Raises:
            ShapeMismatchError: They are for weights of different sizes.
        """
        telling = [effect for effect in effects if effect.weight is not None] or effects
        point = max((effect.point for effect in telling), key=lambda point: len(point.shape))
        if wrong := [one.point for one in telling if math.prod(one.point.shape) != math.prod(point.shape)]:
            raise ShapeMismatchError(f"they are for weights of {wrong[0].shape} and {point.shape}", key=point.id)
        return _Together(point, effects, weights, seed)

    def merged(self, updates: Sequence[Tensor | None], method: str, density: float) -> Tensor:
        """One update of those that each adds; None for nothing."""
        own = [(u, w) for u, w in zip(updates, self.weights, strict=True) if u is not None]
        given, weights = [update for update, _ in own], [w for _, w in own]
        if method == SUM:
            return sparse.total([w * update for update, w in own])
        return sparse.merged(method, given, weights, density, self.seed)

    def bias(self, method: str, density: float) -> Tensor | None:
        own = [one.bias for one in self.effects]
        if all(one is None for one in own):
            return None
        return self.merged(own, method, density)


def _matrix(one: _Together, method: str, rule: RankRule | None, density: float) -> tuple[Factors, PointError]:
    own = [(effect, w) for effect, w in zip(one.effects, one.weights, strict=True) if effect.weight is not None]
    low = [effect.weight for effect, _ in own if isinstance(effect.weight, Factors)]
    before = sum(effect.rank for effect, _ in own)
    if method == SUM and len(low) == len(own):
        whole = low_rank_algebra.concatenated([_shaped(one.point, f) for f in low], [w for _, w in own])
        if rule is not None:
            return resized(Effect(one.point, whole), rule, before)
        return whole, PointError(whole.rank, before, low_rank_algebra.norm(whole), 0.0)
    if rule is None and len(low) < len(own):
        raise ConfigError(
            [f"{one.point.id}: what is added there is of no low rank; say what to keep: a rank, an energy or an error"],
            "combine()",
        )
    dense = one.merged(
        [None if e.weight is None else e.dense.reshape(one.point.shape) for e in one.effects], method, density
    )
    return resized(Effect(one.point, dense), rule or RankRule(before), before)


def _shaped(point: InjectionPoint, factors: Factors) -> Factors:
    return Factors(factors.A.reshape(factors.rank, *point.shape[1:]), factors.B, point.layout, factors.scale)


def _plain(one: _Together, points: Points | None, method: str, density: float) -> Update:
    """What is added to a weight of one axis (a norm's) cannot be low rank: the model's own parameters say it."""
    if points is None or points.model is None:
        raise base_needed(
            "what is added there is no matrix, and only the base's values can hold it", None, one.point.id
        )
    weight, bias = points.model.values(one.point)
    own = {"weight": weight + one.merged([effect.dense for effect in one.effects], method, density)}
    shift = one.bias(method, density)
    if bias is not None:
        own["bias"] = bias if shift is None else bias + shift
    return Update(one.point.id, own=own)


def _metadata(shares: Sequence[Share], method: str) -> dict[str, str]:
    told = ", ".join(f"{share.name or number} x {share.weight:g}" for number, share in enumerate(shares))
    both = [set(share.checkpoint.metadata.items()) for share in shares]
    return {**dict(sorted(set.intersection(*both))), "modelspec.merged_from": f"{method} of {told}"}


def _check(shares: Sequence[Share], method: str, density: float) -> None:
    problems = [] if shares else ["name at least one adapter"]
    if method not in METHODS:
        problems.append(
            f"method must be one of {', '.join(METHODS)}, not {shown(method)}.{did_you_mean(method, METHODS)}"
        )
    if not (is_number(density) and 0 < density <= 1):
        problems.append(f"density must be more than 0 and at most 1, not {shown(density)}")
    for share in shares:
        wrong = [factor for factor in (share.weight, *share.blocks.values()) if not is_number(factor)]
        problems += [f"a weight must be a number, not {shown(factor)}" for factor in wrong]
    if problems:
        raise ConfigError(problems, "combine()")
