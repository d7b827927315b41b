"""What an adapter adds to each weight: as two thin factors where there are some, and dense otherwise."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.adapter import AdapterModule, AdditiveModule
from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.factors import Factors
from adapterkit.errors import IncompatibleTargetError, NotMergeableError
from adapterkit.kernels import low_rank, low_rank_algebra
from adapterkit.kernels.sums import checked_merged
from adapterkit.points import InjectionPoint, ParameterPoint, Points
from adapterkit.tools.modules import Placed, base_needed, modules


@dataclass(frozen=True)
class Effect:
    """What an adapter adds at one point.

    Attributes:
        point: Where.
        weight: What is added to the weight, [out, in / groups, *kernel]; None for nothing.
        bias: What is added to the bias, [out]; None for nothing.
    """

    point: InjectionPoint
    weight: Factors | Tensor | None
    bias: Tensor | None = None

    @property
    def dense(self) -> Tensor:
        """What is added to the weight, in float32 or wider."""
        if self.weight is None:
            return torch.zeros(self.point.shape)
        return low_rank.dense(self.weight) if isinstance(self.weight, Factors) else self.weight

    @property
    def norm(self) -> float:
        """The Frobenius norm of what is added to the weight and the bias."""
        own = low_rank_algebra.norm(self.weight) if isinstance(self.weight, Factors) else _norm(self.weight)
        return own if self.bias is None else math.hypot(own, _norm(self.bias))

    @property
    def singular_values(self) -> Tensor:
        """Those of what is added to the weight, in float64, descending."""
        if isinstance(self.weight, Factors):
            return low_rank_algebra.singular_values(self.weight)
        matrix = self.dense.double()
        return torch.linalg.svdvals(matrix.flatten(1) if matrix.ndim > 1 else matrix[:, None])

    @property
    def rank(self) -> int:
        """The highest that what is added to the weight can have."""
        if self.weight is None:
            return 0
        out, *rest = self.point.shape
        most = min(out, math.prod(rest))
        return min(self.weight.rank, most) if isinstance(self.weight, Factors) else most


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


@torch.no_grad()
def effects(checkpoint: Checkpoint, points: Points | None = None, source: object = None) -> Iterator[Effect]:
    """What a checkpoint's adapter adds, point by point, with all of its strength.

    Args:
        checkpoint: The adapter.
        points: The model's, where it is at hand. Types whose effect depends on the weight need its values too:
            `points.model`.
        source: Named in errors.

    Raises:
        BaseNeededError: What it does cannot be told without the model.
        NotMergeableError: It adds nothing to a weight, but does something else.
        CheckpointError: Its tensors are not those that its type asks for.
    """
    for placed in modules(checkpoint, points, source):
        yield effect_of(placed, points, source)


def effect_of(placed: Placed, points: Points | None = None, source: object = None) -> Effect:
    """What a module adds at its point; errors as for `effects`."""
    found = _effect(placed, points, source)
    if found.weight is not None and not placed.sized:
        raise base_needed("of which shape the weight is there its tensors do not tell", source, placed.key)
    return found


def _effect(placed: Placed, points: Points | None, source: object) -> Effect:
    point, module = placed.point, placed.module
    if point is None or module is None:
        if placed.config.kinds.isdisjoint({"weight", "norm"}):
            raise NotMergeableError(f"{placed.key}: {type(placed.config).__name__} acts on no weight")
        raise base_needed("of which shape the weight is there cannot be told", source, placed.key)
    factors = module.factors() if isinstance(module, AdditiveModule) and module.abilities.low_rank else None
    if factors is not None:
        return Effect(point, factors)
    if not isinstance(point, ParameterPoint) or not module.abilities.merge:
        raise NotMergeableError(f"{point.id}: {type(module).__name__} acts otherwise than by another weight")
    if isinstance(module, AdditiveModule):
        return _difference(module, point, torch.zeros(point.shape), torch.zeros(point.out_features))
    module.double()  # differences of weights are then exact enough; the checkpoint's own tensors stay as they are
    values = _values(points, point)
    found = _sum(module, point) if values is None else _difference(module, point, *values)
    if found is None:
        raise base_needed(f"what {type(module).__name__} does depends on the weight there", source, point.id)
    return found


def _values(points: Points | None, point: InjectionPoint) -> tuple[Tensor, Tensor | None] | None:
    """The base's weight and bias, in float64."""
    if points is None or points.model is None:
        return None
    try:
        weight, bias = points.model.values(point)
    except IncompatibleTargetError:  # it is on the meta device, or kept in few bits
        return None
    return weight.double(), None if bias is None else bias.double()


def _difference(module: AdapterModule, point: InjectionPoint, weight: Tensor, bias: Tensor | None) -> Effect:
    merged, merged_bias = checked_merged(module, weight, bias)
    if merged.shape != weight.shape:
        raise NotMergeableError(f"{point.id}: {type(module).__name__} gives the weight another size")
    shift = None if merged_bias is None or merged_bias is bias else merged_bias - (0 if bias is None else bias)
    return Effect(point, *(None if one is None or not one.any() else one for one in (merged - weight, shift)))


def _sum(module: AdapterModule, point: InjectionPoint) -> Effect | None:
    """What a module adds, if that is the same whatever the weight is; None where it is not.

    Two weights tell, in float64, where rounding is far below what any adapter does.
    """
    generator = torch.Generator().manual_seed(0)
    zero, other = (
        [make(shape, dtype=torch.float64) for shape in (point.shape, (point.out_features,))]
        for make in (torch.zeros, functools.partial(torch.randn, generator=generator))
    )
    found, again = _difference(module, point, *zero), _difference(module, point, *other)
    none = torch.zeros(point.out_features, dtype=torch.float64)
    dense = [one.dense.double() for one in (found, again)]
    shifts = [none if one.bias is None else one.bias for one in (found, again)]
    alike = all(torch.allclose(*pair, rtol=1e-9, atol=1e-11) for pair in (dense, shifts))
    return found if alike else None
