"""How the active adapters of one point act together: a weighted sum of their effects around the frozen base.

    y = base(x) + sum_i w_i * (adapter_i(x, base) - base(x))

One adapter of weight 1 is simply called, so that a type is free to do anything with its base. A weight may also be one
number for each row of the batch: that is how every sample gets adapters of its own. What stands for an adapter here may
be several that act as one; see `adapterkit.composites`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.adapter import AdditiveModule, Base
from adapterkit.errors import AttachError, RoutingError
from adapterkit.kernels.spans import read_span, write_spans
from adapterkit.kernels.weights import call_weight
from adapterkit.points import InjectionPoint, Span, WeightLayout
from adapterkit.selection import Strength


class Acting(Protocol):
    """An adapter module, or several that act as one. `scalable` is as in `AdapterModule`."""

    scalable: bool

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `nn.Module.parameters`."""
        ...

    def __call__(self, x: Tensor, base: Base, /) -> Tensor:
        """See `AdapterModule.forward`."""
        ...

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `AdapterModule.extend`."""
        ...

    def lengthen(self, tokens: Tensor) -> Tensor:
        """See `AdapterModule.lengthen`."""
        ...

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`."""
        ...


Active = Sequence[tuple[Acting, Strength]]


ReadBase = Callable[[], tuple[Tensor | None, Tensor | None]]
"""Gives the weight and bias of a point's base."""


class Frozen:
    """The weight and bias of a weight point's base."""

    def __init__(self, point: InjectionPoint, read: ReadBase) -> None:
        self._point, self._read = point, read

    @property
    def weight(self) -> Tensor:
        """See `adapterkit.adapter.WeightBase`."""
        weight, _ = self._read()
        if weight is None or not weight.is_floating_point():
            raise AttachError("the adapter reads the base's weight, and there is no dense one (a quantized layer?)")
        return weight

    @property
    def bias(self) -> Tensor | None:
        """See `adapterkit.adapter.WeightBase`."""
        return self._read()[1]

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `adapterkit.adapter.WeightBase`."""
        layout = self._point.layout
        if not isinstance(layout, WeightLayout):
            raise TypeError(f"{self._point.id} is no weight point")
        return call_weight(x, weight, bias, layout)


class Computed:
    """A base that is computed at most once for the input the model gave, and anew for any other."""

    def __init__(self, compute: Base, x: Tensor) -> None:
        self._compute, self._x = compute, x
        self._y: Tensor | None = None

    def __call__(self, x: Tensor, /) -> Tensor:
        """See `adapterkit.adapter.Base`."""
        if x is not self._x:
            return self._compute(x)
        if self._y is None:
            self._y = self._compute(x)
        return self._y

    def fill(self, y: Tensor) -> None:
        """Sets what has been computed elsewhere."""
        self._y = y


class WholeBase(Frozen):
    """The base of a weight point that is the whole module."""

    def __init__(self, whole: Base, point: InjectionPoint, read: ReadBase) -> None:
        super().__init__(point, read)
        self._whole = whole

    def __call__(self, x: Tensor, /) -> Tensor:
        """See `adapterkit.adapter.Base`."""
        return self._whole(x)


class PartBase(Frozen):
    """The base of a point that sees only a part of the input: asked for that part, it answers for the whole input.

    Args:
        whole: The base of the whole input `x`.
        x: That input.
        part: The part of it that the point sees.
        span: Where the part lies.
        point: The point.
        read: Its weight.
    """

    def __init__(self, whole: Base, x: Tensor, part: Tensor, span: Span, point: InjectionPoint, read: ReadBase) -> None:
        super().__init__(point, read)
        self._whole, self._x, self._part, self._span = whole, x, part, span

    def __call__(self, x: Tensor, /) -> Tensor:
        """See `adapterkit.adapter.Base`."""
        return self._whole(self._x if x is self._part else write_spans(self._x, [(self._span, x)], -1))

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `adapterkit.adapter.WeightBase`: the base's output is that of other inputs too."""
        y = self(x) + F.linear(x, weight - self.weight)
        return y if bias is None else y + (bias if self.bias is None else bias - self.bias)


class SpanBase(Frozen):
    """The rows of a base's output that belong to one point."""

    def __init__(self, whole: Base, span: Span, dim: int, point: InjectionPoint, read: ReadBase) -> None:
        super().__init__(point, read)
        self._whole, self._span, self._dim = whole, span, dim

    def __call__(self, x: Tensor, /) -> Tensor:
        """See `adapterkit.adapter.Base`."""
        return read_span(self._whole(x), self._span, self._dim)


class SublayerBase:
    """The base at an output point: a sublayer that has already run, and the norms next to it."""

    def __init__(self, x: Tensor, output: Tensor, norm_in: nn.Module | None, norm_out: nn.Module | None) -> None:
        self._x, self._output, self._norm_in, self._norm_out = x, output, norm_in, norm_out

    def __call__(self, x: Tensor, /) -> Tensor:
        """See `adapterkit.adapter.Base`."""
        if x is not self._x:
            raise ValueError("at an output point base(x) can only be asked for the x that forward was given")
        return self._output

    # The norms' forwards are called bare: their hooks belong to the model's own call.
    def norm_in(self, x: Tensor) -> Tensor:
        """The pre-norm, or `x` itself in a post-norm block."""
        return x if self._norm_in is None else self._norm_in.forward(x)

    def norm_out(self, x: Tensor) -> Tensor:
        """The post-norm, or `x` itself in a pre-norm block."""
        return x if self._norm_out is None else self._norm_out.forward(x)


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


def extend_all(
    keys: Tensor, values: Tensor, mask: Tensor | None, active: Active, *, queries: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values extended by every active adapter, and the mask that goes with them.

    A weight w multiplies the attention mass of an adapter's positions: log w is added to their logits, so that 1
    changes nothing and the limit 0 is the base.

    Args:
        keys, values: [batch, kv_heads, length, head_dim].
        mask: Broadcastable to [batch, heads, queries, length], boolean or additive, or None.
        queries: Number of query positions.
        causal: What a missing mask means.
    """
    if mask is None and causal and queries > 1:
        # Torch aligns is_causal to the upper left, which is wrong as soon as positions are put in front.
        mask = _causal_mask(queries, keys.shape[2], keys.device)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], keys.shape[2])  # a mask may broadcast over the keys
    for adapter, weight in active:
        before = keys.shape[2]
        keys, values = adapter.extend(keys, values)
        mask = _widen(mask, keys.shape[2] - before, weight, keys)
    return keys, values, mask


def _causal_mask(queries: int, length: int, device: torch.device) -> Tensor:
    rows = torch.arange(queries, device=device)[:, None]
    return (rows >= torch.arange(length, device=device)[None, :])[None, None]


def _widen(mask: Tensor | None, added: int, weight: Strength, keys: Tensor) -> Tensor | None:
    """The mask with `added` visible columns in front, of log-weight log(`weight`)."""
    if mask is None:
        if is_one(weight) or not added:
            return None
        mask = torch.zeros((1, 1, 1, keys.shape[2] - added), dtype=keys.dtype, device=keys.device)
    if mask.dtype == torch.bool:
        if is_one(weight):
            return torch.cat([mask.new_ones((*mask.shape[:-1], added)), mask], dim=-1)
        mask = torch.zeros_like(mask, dtype=keys.dtype).masked_fill(~mask, float("-inf"))
    if isinstance(weight, Tensor) and not weight.ndim:
        front = weight.to(mask.device, mask.dtype).log().expand(*mask.shape[:-1], added)
        return torch.cat([front, mask], dim=-1)
    if isinstance(weight, Tensor):
        check_rows(keys, weight)
        mask = mask.expand(len(weight), *mask.shape[1:])
        logs = weight.to(mask.device, mask.dtype).log().view(-1, 1, 1, 1)
        return torch.cat([logs.expand(*mask.shape[:-1], added), mask], dim=-1)
    front = mask.new_full((*mask.shape[:-1], added), math.log(weight))
    return torch.cat([front, mask], dim=-1)
