"""What a fine-tuned model has learnt, as an adapter: the best low-rank approximation of how its weights differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import BaseMismatchError
from adapterkit.mapping.targets import some
from adapterkit.points import NormPoint, ParameterPoint
from adapterkit.selectors import Selector
from adapterkit.tools.base import Base
from adapterkit.tools.effects import Effect
from adapterkit.tools.made import Made, Update
from adapterkit.tools.ranks import RankRule
from adapterkit.tools.resize import PointError, Resized, resized


@dataclass(frozen=True)
class Extracted(Resized):
    """An adapter that was extracted.

    Attributes:
        others: Norm of the changes of biases and norms that are not in the adapter, by point.
    """

    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The norm of all that was left out of what was looked at, relative to that of all changes there."""
        left = math.hypot(*self.others.values())
        whole = math.hypot(left, *(one.norm for one in self.points.values()))
        return math.hypot(left, *(one.error for one in self.points.values())) / whole if whole else 0.0


@torch.no_grad()
def extract(
    tuned: Base,
    base: Base,
    rule: RankRule,
    *,
    targets: str = "all",
    others: bool = False,
    least: float = 0.0,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Extracted:
    """An adapter that makes the tuned model of the base, as well as its ranks allow.

    Args:
        tuned, base: Models of one kind; see `open_base` and `base_of`.
        rule: The ranks.
        targets: A selector of weights. Norms are looked at beside them.
        others: Whether changes of biases and norms go in too, exactly; not every format can hold them.
        least: Changes of which no entry is larger than this are taken for none.
        dtype: Of the adapter's tensors.
        metadata: Of the adapter.

    Raises:
        BaseMismatchError: They are models of different kinds, or equal.
        ModelNotFoundError: The weights of one are not here.
        TargetNotFoundError: The selector matches nothing.
    """
    pairs = _pairs(tuned, base, targets)
    made, found, left, used = Made(dtype), dict[str, PointError](), dict[str, float](), list[ParameterPoint]()
    for there, point in pairs:
        change = _change(tuned, there, base, point, least)
        if change.weight is not None and len(point.shape) > 1:
            factors, found[point.id] = resized(change, rule, change.rank)
            made.add(Update(point.id, factors, change.bias if others else None))
            used.append(point)
        elif others and (change.weight is not None or change.bias is not None):
            made.add(_exactly(tuned, there, change))
            used.append(point)
        if not others and (rest := _rest(change)):
            left[point.id] = rest
    if not used:
        raise BaseMismatchError(
            f"no weight differs{' enough' if least else ''}; the models are the same at {targets!r}"
        )
    like = Checkpoint([], base.mapped.fingerprint(used), _backends(base, used))
    return Extracted(made.checkpoint([like], metadata or {}), found, others=left)


def _pairs(tuned: Base, base: Base, targets: str) -> list[tuple[ParameterPoint, ParameterPoint]]:
    """The points of both models that are looked at: what the selector says, and the norms of the same components."""
    wanted = Selector(targets).select([*base.points], base.label)
    ids, components = {point.id for point in wanted}, {point.component for point in wanted}
    own = [
        point
        for point in base.points
        if isinstance(point, ParameterPoint)
        and (point.id in ids or (isinstance(point, NormPoint) and point.component in components))
    ]
    there = {point.id: point for point in tuned.points if isinstance(point, ParameterPoint)}
    wrong = [point.id for point in own if point.id not in there or there[point.id].shape != point.shape]
    if wrong:
        raise BaseMismatchError(f"has no such weights as the base has: {some(wrong)}; is it of its kind?", tuned.label)
    return [(there[point.id], point) for point in own]


def _change(tuned: Base, there: ParameterPoint, base: Base, point: ParameterPoint, least: float) -> Effect:
    (new, new_bias), (old, old_bias) = _values(tuned, there), _values(base, point)
    shift = None if new_bias is None else new_bias - (0 if old_bias is None else old_bias)
    weight, bias = (None if one is None or not bool((one.abs() > least).any()) else one for one in (new - old, shift))
    return Effect(point, weight, bias)


def _values(base: Base, point: ParameterPoint) -> tuple[Tensor, Tensor | None]:
    model = base.points.model
    assert model is not None
    return model.values(point)


def _exactly(tuned: Base, there: ParameterPoint, change: Effect) -> Update:
    """What is no matrix, or changes a bias alone."""
    if change.weight is None:
        return Update(change.point.id, bias=change.bias)
    weight, bias = _values(tuned, there)
    return Update(change.point.id, own={"weight": weight, **({} if bias is None else {"bias": bias})})


def _rest(change: Effect) -> float:
    """The norm of what no low-rank update of a weight says."""
    return change.norm if len(change.point.shape) == 1 else Effect(change.point, None, change.bias).norm


def _backends(base: Base, used: Sequence[ParameterPoint]) -> dict[str, str]:
    components = {point.component for point in used}
    return {name: one.backend_name for name, one in base.mapped.components.items() if name in components}
