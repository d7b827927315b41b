"""Keys and values that active adapters extend, and the mask that goes with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from adapterkit.engine.context import Beside, Side, no_side
from adapterkit.kernels.batches import Share
from adapterkit.kernels.sums import Active, Strength, is_one


def extend_all(
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    active: Active,
    side: Side = no_side,
    given: Callable[[], Tensor] | None = None,
    *,
    queries: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values extended by every active adapter, and the mask that goes with them.

    A weight w multiplies the attention mass of an adapter's positions: log w is added to their logits, so that 1
    changes nothing and the limit 0 is the base.

    Args:
        keys, values: [batch, kv_heads, length, head_dim].
        mask: Broadcastable to [batch, heads, queries, length], boolean or additive, or None.
        active: What extends them, with its weights.
        side: The side inputs.
        given: What the attention's module was called with, where one of them reads it.
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
        base = (Beside(keys, side, given),) if "extend" in adapter.abilities.beside else ()
        keys, values = adapter.extend(keys, values, *base)  # type: ignore[call-arg]
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
    if isinstance(weight, Tensor):
        front = weight.to(mask.device, mask.dtype).log().expand(*mask.shape[:-1], added)
        return torch.cat([front, mask], dim=-1)
    if isinstance(weight, Share):
        mask = mask.expand(len(keys), *mask.shape[1:])
        logs = weight.rows(keys).to(mask.dtype).log().view(-1, 1, 1, 1)
        return torch.cat([logs.expand(*mask.shape[:-1], added), mask], dim=-1)
    front = mask.new_full((*mask.shape[:-1], added), math.log(weight))
    return torch.cat([front, mask], dim=-1)
