"""How several adapters act together: a weighted sum of their effects around the frozen base.

    y = base(x) + sum_i w_i * (adapter_i(x, base) - base(x))
    W' = W + sum_i w_i * (merged_i(W) - W),  and the bias likewise

One adapter of weight 1 is simply called, so that a type is free to do anything with its base. A weight may also be one
number for each row of the batch: that is how every sample gets adapters of its own. What stands for an adapter here may
be several that act as one; see `adapterkit.engine.expressions`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapterkit.contract.abilities import Abilities
from adapterkit.contract.base import Base
from adapterkit.errors import PluginError, RoutingError
from adapterkit.kernels.batches import Share
from adapterkit.kernels.gates import Gates

Strength = float | Tensor | Share
"""How strongly an adapter acts at a point: a number, or one for each row of the batch.
Where outputs alone are multiplied it may be `Gates` too.

While torch.compile traces, a number is a tensor of no axes, so that another number needs no other program.
"""


class Acting(Protocol):
    """An adapter module, or several that act as one. `scalable` and `abilities` are as in `AdapterModule`."""

    abilities: Abilities
    scalable: bool

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""
        ...

    def __call__(self, x: Tensor, base: Base, /) -> Tensor: ...

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `AdapterModule.extend`."""
        ...

    def lengthen(self, tokens: Tensor) -> Tensor:
        """As `AdapterModule.lengthen`."""
        ...

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `AdapterModule.merged`."""
        ...


Active = Sequence[tuple[Acting, Strength]]
Combine = Callable[[Tensor, Base], Tensor]
"""`(x, base)`: what `AdapterModule.forward` is for one adapter."""


# -- of outputs -------------------------------------------------------------------------------------------------------


def combine(x: Tensor, base: Base, active: Active) -> Tensor:
    """The output of a point with these adapters. `base` must be cheap to ask twice for `x`."""
    return together(active)(x, base)


def together(active: Active) -> Combine:
    """`combine` for these adapters, without what it would ask in every call."""
    if len(active) != 1 or not is_one(active[0][1]):
        return functools.partial(_summed, active)
    adapter = active[0][0]
    return functools.partial(_alone, adapter) if adapter.abilities.adds else adapter


def adding_alone(active: Active) -> Any:
    """The adapter, where it is the only one and its whole effect is what it adds; else None."""
    is_alone = len(active) == 1 and is_one(active[0][1])
    return active[0][0] if is_alone and active[0][0].abilities.adds else None


def _summed(active: Active, x: Tensor, base: Base) -> Tensor:
    y = base(x)
    return y + effects(x, y, base, active)


def _alone(adapter: Any, x: Tensor, base: Base) -> Tensor:
    if not is_added(adapter):
        return adapter(x, base)
    y = base(x)
    return y + adapter.added(x, y)


def effects(x: Tensor, y: Tensor, base: Base, active: Active) -> Tensor:
    """What these adapters add to `y`, which is `base(x)`."""
    total: Tensor | None = None
    for adapter, weight in active:
        scaled = _scaled(effect(adapter, x, y, base), weight)
        total = scaled if total is None else total + scaled
    return torch.zeros_like(y) if total is None else total


def effect(adapter: Acting, x: Tensor, y: Tensor, base: Base) -> Tensor:
    """What one adapter adds to `y`, which is `base(x)`."""
    if is_added(adapter):
        return adapter.added(x, y)  # type: ignore[attr-defined]
    return adapter.effect(x, y, base) if adapter.abilities.several else adapter(x, base) - y  # type: ignore[attr-defined]


def is_added(adapter: Any) -> bool:
    """Whether an adapter need not be called to know its effect.

    A hook, and a forward on the instance (which fetches offloaded parameters), run where it is called.
    """
    return adapter.abilities.adds and is_bare(adapter)


def is_bare(module: nn.Module) -> bool:
    """Whether a call of a module is one of its class's forward, and nothing else."""
    own = module.__dict__  # by key: this is asked in every call, and a module's attributes are slow
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def is_one(weight: Strength) -> bool:
    """Whether an adapter of this weight, alone, is simply called."""
    return isinstance(weight, (int, float)) and weight == 1.0


def _scaled(effect: Tensor, weight: Strength) -> Tensor:
    if isinstance(weight, (Gates, Share)):
        return weight.scaled(effect)
    return effect if not isinstance(weight, Tensor) and weight == 1.0 else weight * effect


# -- of weights -------------------------------------------------------------------------------------------------------


def merge_weights(weight: Tensor, bias: Tensor | None, active: Active) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that equal `combine` for every x; the very `bias` where it does not change.

    Args:
        weight, bias: As in `AdapterModule.merged`.
        active: Adapters and weights.
    """
    if any(isinstance(scale, (Gates, Share)) for _, scale in active):
        raise RoutingError("samples cannot be routed where one weight serves the whole batch")
    if len(active) == 1 and is_one(active[0][1]):
        return checked_merged(active[0][0], weight, bias)
    total, total_bias = weight, bias
    for adapter, scale in active:
        merged, merged_bias = checked_merged(adapter, weight, bias)
        total = total + scale * (merged - weight)  # type: ignore[operator]
        total_bias = add_bias(total_bias, bias, merged_bias, scale)
    return total, total_bias


def add_bias(total: Tensor | None, bias: Tensor | None, merged: Tensor | None, scale: Strength) -> Tensor | None:
    """`total` and `scale` times what `merged` has more than `bias`; None is zero."""
    if merged is None or merged is bias:
        return total
    change = merged if bias is None else merged - bias
    return scale * change if total is None else total + scale * change  # type: ignore[operator]


def checked_merged(module: Acting, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`module.merged(weight, bias)`; PluginError where the shape is another, and was not meant to be."""
    merged, merged_bias = module.merged(weight, bias)
    check_shape(module, "merged", merged, weight)
    return merged, merged_bias


def check_shape(module: Acting, method: str, made: Tensor, weight: Tensor) -> None:
    """Raises PluginError where a weight was made in another shape, and the type does not say that it replaces it."""
    if module.scalable and made.shape != weight.shape:
        raise PluginError(
            f"{type(module).__name__}.{method}{place_of(module)} gave {tuple(made.shape)}, and the weight is "
            f"{tuple(weight.shape)}"
        )


def fitted(module: Acting, delta: Tensor, y: Tensor) -> Tensor:
    """What a module adds to `y`, the base's output, in its dtype; PluginError where it has another shape."""
    if delta.shape != y.shape:
        raise PluginError(
            f"{type(module).__name__}.delta{place_of(module)} gave {tuple(delta.shape)}, and the base {tuple(y.shape)}"
        )
    return delta if delta.dtype == y.dtype else delta.to(y.dtype)


def place_of(module: object) -> str:
    """Where a module was built for, for messages."""
    place = getattr(module, "at", "")
    return f" at {place}" if place else ""
