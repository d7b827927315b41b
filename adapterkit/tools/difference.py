"""Two adapters beside each other: what they add where, and how alike that is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.factors import Factors
from adapterkit.errors import BaseNeededError, NotMergeableError
from adapterkit.kernels import low_rank_algebra
from adapterkit.points import Points
from adapterkit.tools.effects import Effect, effect_of
from adapterkit.tools.modules import Placed, modules


@dataclass(frozen=True)
class PointDifference:
    """Two adapters at a point that both have.

    Attributes:
        key: The point's id.
        one, other: The norm of what each adds; None where that is not known.
        difference: The norm of the difference; None where it is not known.
        cosine: Of the angle between the two; None where one adds nothing, or it is not known.
        equal: Whether type, config and tensors are equal, bit for bit.
    """

    key: str
    one: float | None
    other: float | None
    difference: float | None
    cosine: float | None
    equal: bool


@dataclass(frozen=True)
class Difference:
    """How two adapters differ.

    Attributes:
        points: Those that both have.
        only_one, only_other: The ids of the others.
        types: Of each.
        configs: Field -> its two values, where they differ.
        metadata: Name -> its two texts, where they differ.
        differing: The number of points where they are not equal bit for bit.
    """

    points: Sequence[PointDifference]
    only_one: Sequence[str]
    only_other: Sequence[str]
    types: tuple[str, str]
    configs: Mapping[str, tuple[Any, Any]]
    metadata: Mapping[str, tuple[str | None, str | None]]

    @property
    def equal(self) -> bool:
        """Whether they do the same everywhere, bit for bit."""
        return not self.only_one and not self.only_other and all(point.equal for point in self.points)

    @property
    def relative(self) -> float | None:
        """The norm of the difference at points of both, relative to the larger of the two norms; None where unknown."""
        if any(None in (point.one, point.other, point.difference) for point in self.points):
            return None
        whole = max((math.hypot(*(getattr(p, name) for p in self.points)) for name in ("one", "other")), default=0.0)
        return math.hypot(*(point.difference or 0.0 for point in self.points)) / whole if whole else 0.0


@torch.no_grad()
def difference(one: Checkpoint, other: Checkpoint, points: Points | None = None) -> Difference:
    """Compares two adapters.

    Args:
        one, other: The adapters.
        points: The model's, where it is at hand; see `effects`.

    Raises:
        CheckpointError: The tensors of one are not those that its type asks for.
    """
    left, right = ({placed.key: placed for placed in modules(each, points)} for each in (one, other))
    both = [_at(left[key], right[key], points) for key in left if key in right]
    pairs = [({k: v for k, v in each.items() if k not in rest}) for each, rest in ((left, right), (right, left))]
    types = tuple(" + ".join(part.type for part in each.parts) for each in (one, other))
    return Difference(both, [*pairs[0]], [*pairs[1]], types, _configs(one, other), _texts(one, other))  # type: ignore[arg-type]


def _at(one: Placed, other: Placed, points: Points | None) -> PointDifference:
    equal = _equal(one, other)
    try:
        a, b = effect_of(one, points), effect_of(other, points)
    except (NotMergeableError, BaseNeededError):
        return PointDifference(one.key, None, None, 0.0 if equal else None, None, equal)
    if len({_size(a), _size(b)} - {None}) > 1:
        return PointDifference(one.key, a.norm, b.norm, None, None, False)
    norms, product = (a.norm, b.norm), _inner(a, b)
    apart = 0.0 if equal else _apart(a, b, norms, product)
    cosine = max(-1.0, min(1.0, product / (norms[0] * norms[1]))) if all(norms) else None
    return PointDifference(one.key, *norms, apart, cosine, equal)


def _equal(one: Placed, other: Placed) -> bool:
    if one.module is None or other.module is None or type(one.module) is not type(other.module):
        return False
    left, right = one.module.state_dict(), other.module.state_dict()
    same = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    configs = [{**each.config.at(each.key).to_dict(), "targets": ""} for each in (one, other)]
    return same and configs[0] == configs[1]


def _size(effect: Effect) -> int | None:
    """Numbers in the weight; None where nothing is added to it."""
    return None if effect.weight is None else math.prod(effect.point.shape)


def _inner(a: Effect, b: Effect) -> float:
    biases = 0.0 if a.bias is None or b.bias is None else float((a.bias.double() * b.bias.double()).sum())
    if a.weight is None or b.weight is None:
        return biases
    if isinstance(a.weight, Factors) and isinstance(b.weight, Factors):
        return low_rank_algebra.inner(a.weight, b.weight) + biases
    return float((a.dense.double().flatten() * b.dense.double().flatten()).sum()) + biases


def _apart(a: Effect, b: Effect, norms: tuple[float, float], product: float) -> float:
    """The norm of the difference. What nearly cancels is computed from the difference itself."""
    square = norms[0] ** 2 + norms[1] ** 2 - 2 * product
    if square > 1e-10 * max(norms) ** 2:
        return square**0.5
    weight, bias = a.dense.double().flatten() - b.dense.double().flatten(), 0.0
    if a.bias is not None or b.bias is not None:
        zero = torch.zeros(a.point.out_features)
        bias = float(((zero if a.bias is None else a.bias) - (zero if b.bias is None else b.bias)).double().norm())
    return math.hypot(float(weight.norm()), bias)


def _configs(one: Checkpoint, other: Checkpoint) -> dict[str, tuple[Any, Any]]:
    left, right = ({f"{p.type}.{k}": v for p in each.parts for k, v in p.config.items()} for each in (one, other))
    found = {key: (left.get(key), right.get(key)) for key in {**left, **right}}
    return {key: pair for key, pair in found.items() if json.dumps(pair[0]) != json.dumps(pair[1])}


def _texts(one: Checkpoint, other: Checkpoint) -> dict[str, tuple[str | None, str | None]]:
    found = {key: (one.metadata.get(key), other.metadata.get(key)) for key in {**one.metadata, **other.metadata}}
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}
