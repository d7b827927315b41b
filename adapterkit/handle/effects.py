"""How strong an adapter is, block by block: computed when somebody asks, and never in a load."""

from __future__ import annotations

import collections
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapterkit.adapter import AdapterModule, AdditiveModule
from adapterkit.errors import AdapterKitError, IncompatibleTargetError, NotMergeableError
from adapterkit.handle.starting import Values, base_values
from adapterkit.handle.state import Attached, State
from adapterkit.kernels import low_rank_algebra
from adapterkit.kernels.sums import checked_merged
from adapterkit.points import InjectionPoint, ParameterPoint


@dataclass(frozen=True)
class Effects:
    """What an adapter does to the weights, as it is now.

    Attributes:
        ranks: Rank -> how many points have it.
        scales: Factor on the update -> how many points have it.
        norms: `component.block` -> the Frobenius norm of what is added to the weights and biases there.
        unknown: Why a norm is not known -> of how many points.
    """

    ranks: Mapping[int, int] = field(default_factory=dict)
    scales: Mapping[float, int] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Of all that is known."""
        return math.hypot(*self.norms.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        counts = {name: {str(k): n for k, n in getattr(self, name).items()} for name in ("ranks", "scales")}
        return {**counts, "norm": self.norm, "norms": dict(self.norms), "unknown": dict(self.unknown)}


class Watched:
    """An adapter that may be gone when it is asked for; whoever holds a report does not hold the adapter.

    Args:
        state: Of its model.
        name: The adapter's.
    """

    def __init__(self, state: State, name: str) -> None:
        self._state, self._name = weakref.ref(state), name
        self._first = self._module(state.adapters[name])

    @staticmethod
    def _module(attached: Attached) -> weakref.ref[AdapterModule] | None:
        first = next(iter(attached.modules.values()), None)
        return None if first is None else weakref.ref(first)

    def effects(self) -> Effects | None:
        """None where it has been removed."""
        state = self._state()
        attached = None if state is None else state.adapters.get(self._name)
        if state is None or attached is None or self._module(attached) != self._first:
            return None
        return effects(attached, state)


@torch.no_grad()
def effects(attached: Attached, state: State) -> Effects:
    """What an adapter does.

    Args:
        attached: The adapter.
        state: Of its model, whose weights some types need.
    """
    ranks, scales = [], []
    squares: dict[str, float] = {}
    unknown: collections.Counter[str] = collections.Counter()
    for part in attached.parts:
        for point in part.points:
            ranks.append(part.config.rank_at(point))
            scales.append(part.config.scale_at(point))
            norm = _norm(part.modules[point.id], point, state)
            if isinstance(norm, str):
                unknown[norm] += 1
            else:
                block = point.id.partition("@")[2]
                squares[block] = squares.get(block, 0.0) + norm**2
    norms = {block: square**0.5 for block, square in squares.items()}
    return Effects(_counts(ranks), _counts(scales), norms, dict(unknown))


def _counts(values: Iterable[Any]) -> dict[Any, int]:
    return dict(sorted(collections.Counter(value for value in values if value is not None).items()))


def _norm(module: AdapterModule, point: InjectionPoint, state: State) -> float | str:
    """The norm of what is added at a point; or why that is not known."""
    factors = module.factors() if isinstance(module, AdditiveModule) and module.abilities.low_rank else None
    if factors is not None:
        return "its values are not here" if factors.A.is_meta else low_rank_algebra.norm(factors)
    if not isinstance(point, ParameterPoint) or not module.abilities.merge:
        return "it changes no weight"
    if any(tensor.is_meta for tensor in module.parameters()):
        return "its values are not here"
    try:
        values = _values(module, point, state)
        if values is None:
            return "the base's values are not here"
        return math.hypot(*(_length(change) for change in _changes(module, *values)))
    except NotMergeableError:
        return "it is no change of the weight alone"
    except IncompatibleTargetError:
        return "the base keeps its weights in few bits, and it depends on them"
    except AdapterKitError as error:
        return f"{type(module).__name__} fails: {type(error).__name__}"


def _values(module: AdapterModule, point: ParameterPoint, state: State) -> Values | None:
    """The weight and bias to which it is added; zeros, where they do not matter."""
    if isinstance(module, AdditiveModule):
        device = next((tensor.device for tensor in module.parameters()), None)
        return torch.zeros(point.shape, device=device), torch.zeros(point.out_features, device=device)
    return None if state.merge is not None else base_values(type(module).__name__, point, state.mapped)


def _changes(module: AdapterModule, weight: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    merged, merged_bias = checked_merged(module, weight, bias)
    if merged.shape == weight.shape:
        yield merged - weight
    if merged_bias is not None and merged_bias is not bias:
        yield merged_bias if bias is None else merged_bias - bias


def _length(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
