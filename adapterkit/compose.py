"""How the active adapters of one point act together: a weighted sum of their effects around the frozen base.

    y = base(x) + sum_i w_i * (adapter_i(x, base) - base(x))

One adapter of weight 1 is simply called, so that a type is free to do anything with its base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterModule, AdditiveModule, Base
from adapterkit.kernels.spans import read_span, write_spans
from adapterkit.points import Span

Active = Sequence[tuple[AdapterModule, float]]


class Selection:
    """What acts: adapter names with their weights, in the order they were asked for. Immutable."""

    __slots__ = ("weights",)

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.weights: dict[str, float] = dict(weights or {})

    def without(self, names: frozenset[str]) -> Selection:
        """The same selection, fewer names."""
        return Selection({name: w for name, w in self.weights.items() if name not in names})

    def __bool__(self) -> bool:
        return bool(self.weights)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self.weights == other.weights

    def __hash__(self) -> int:
        return hash(tuple(self.weights.items()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __repr__(self) -> str:
        return f"Selection({self.weights})"


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


class PartBase:
    """The base of a point that sees only a part of the input: asked for that part, it answers for the whole input.

    Args:
        whole: The base of the whole input `x`.
        x: That input.
        part: The part of it that the point sees.
        span: Where the part lies.
    """

    def __init__(self, whole: Base, x: Tensor, part: Tensor, span: Span) -> None:
        self._whole, self._x, self._part, self._span = whole, x, part, span

    def __call__(self, x: Tensor, /) -> Tensor:
        """See `adapterkit.adapter.Base`."""
        return self._whole(self._x if x is self._part else write_spans(self._x, [(self._span, x)], -1))


class SpanBase:
    """The rows of a base's output that belong to one point."""

    def __init__(self, whole: Base, span: Span, dim: int) -> None:
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
    if len(active) == 1 and active[0][1] == 1.0:
        return active[0][0](x, base)
    return base(x) + effects(x, base, active)


def effects(x: Tensor, base: Base, active: Active) -> Tensor:
    """What these adapters add to `base(x)`."""
    y = base(x)
    total: Tensor | None = None
    for adapter, weight in active:
        effect = adapter.delta(x).to(y.dtype) if isinstance(adapter, AdditiveModule) else adapter(x, base) - y
        total = weight * effect if total is None else total + weight * effect
    return torch.zeros_like(y) if total is None else total


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


def _widen(mask: Tensor | None, added: int, weight: float, keys: Tensor) -> Tensor | None:
    """The mask with `added` visible columns in front, of log-weight log(`weight`)."""
    if mask is None:
        if weight == 1.0 or not added:
            return None
        mask = torch.zeros((1, 1, 1, keys.shape[2] - added), dtype=keys.dtype, device=keys.device)
    if mask.dtype == torch.bool:
        if weight == 1.0:
            return torch.cat([mask.new_ones((*mask.shape[:-1], added)), mask], dim=-1)
        mask = torch.zeros_like(mask, dtype=keys.dtype).masked_fill(~mask, float("-inf"))
    front = mask.new_full((*mask.shape[:-1], added), math.log(weight))
    return torch.cat([front, mask], dim=-1)
