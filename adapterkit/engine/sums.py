"""How the active adapters of one point act together: a weighted sum of their effects around the frozen base.

    y = base(x) + sum_i w_i * (adapter_i(x, base) - base(x))

One adapter of weight 1 is simply called, so that a type is free to do anything with its base. A weight may also be one
number for each row of the batch: that is how every sample gets adapters of its own. What stands for an adapter here may
be several that act as one; see `adapterkit.engine.expressions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdditiveModule, Base
from adapterkit.engine.selection import Strength
from adapterkit.errors import RoutingError


class Acting(Protocol):
    """An adapter module, or several that act as one. `scalable` is as in `AdapterModule`, and `extends`."""

    scalable: bool
    extends: bool

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(self, x: Tensor, base: Base, /) -> Tensor: ...

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...

    def lengthen(self, tokens: Tensor) -> Tensor: ...

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]: ...


Active = Sequence[tuple[Acting, Strength]]


def combine(x: Tensor, base: Base, active: Active) -> Tensor:
    """The output of a point with these adapters. `base` must be cheap to ask twice for `x`."""
    if len(active) == 1 and is_one(active[0][1]):
        return active[0][0](x, base)
    return base(x) + effects(x, base, active)


def effects(x: Tensor, base: Base, active: Active) -> Tensor:
    """What these adapters add to `base(x)`."""
    y = base(x)
    total: Tensor | None = None
    for adapter, weight in active:
        # A forward on the instance is a hook that fetches offloaded parameters: go through it.
        if isinstance(adapter, AdditiveModule) and adapter.has_delta and "forward" not in adapter.__dict__:
            effect = adapter.added(x, y)
        else:
            effect = adapter(x, base) - y
        scaled = _scaled(effect, weight)
        total = scaled if total is None else total + scaled
    return torch.zeros_like(y) if total is None else total


def is_one(weight: Strength) -> bool:
    """Whether an adapter of this weight, alone, is simply called."""
    return not isinstance(weight, Tensor) and weight == 1.0


def _scaled(effect: Tensor, weight: Strength) -> Tensor:
    if not isinstance(weight, Tensor) or not weight.ndim:
        return weight * effect
    check_rows(effect, weight)
    rows = weight.to(effect.device, effect.dtype).view(-1, *(1 for _ in effect.shape[1:]))
    return rows * effect.masked_fill(rows == 0, 0)  # what overflows in one row must not reach another: 0 * inf is NaN


def check_rows(tensor: Tensor, weight: Tensor) -> None:
    """Raises RoutingError where the rows that were routed are not those of this tensor."""
    if tensor.shape[0] != len(weight):
        raise RoutingError(
            f"{len(weight)} samples were routed, but a tensor {tuple(tensor.shape)} has {tensor.shape[0]} rows. "
            "Name one adapter for each row that the model sees (a diffusion pipeline with guidance doubles the batch), "
            "and route none that acts where there is no row per sample (position embeddings, windows, experts)"
        )
