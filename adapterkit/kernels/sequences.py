"""Sequences in what a model returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Kept = slice | Tensor
"""Positions: the same for all rows, or those of each row, [batch, kept]."""


def cut(result: Any, kept: Kept, length: int) -> Any:
    """What a module returned, with every sequence of this length in it cut to the kept positions.

    Sequences are tensors [batch, length, ...], attention weights [batch, heads, length, keys], whose keys stay, and the
    logits of routers, [batch * length, experts], beside a sequence that tells the batch; alone, in tuples, or in
    transformers' outputs.
    """
    return _cut(result, kept, length, _batch(result, length))


def _batch(result: Any, length: int) -> int | None:
    """The batch of the first sequence of this length."""
    if isinstance(result, Tensor):
        return len(result) if result.ndim == 3 and result.shape[1] == length else None
    parts: Any = result.values() if hasattr(result, "items") else result if isinstance(result, tuple) else ()
    found = (_batch(part, length) for part in parts)
    return next((batch for batch in found if batch is not None), None)


def _cut(result: Any, kept: Kept, length: int, batch: int | None) -> Any:
    if isinstance(result, Tensor):
        if result.ndim == 3 and result.shape[1] == length:
            return _taken(result, kept)
        if result.ndim == 4 and result.shape[2] == length:
            return _taken(result.transpose(1, 2), kept).transpose(1, 2)
        if batch is not None and result.ndim == 2 and len(result) == batch * length:
            return _taken(result.unflatten(0, (batch, length)), kept).flatten(0, 1)
        return result
    if isinstance(result, tuple):
        return tuple(_cut(part, kept, length, batch) for part in result)
    if hasattr(result, "items"):  # a ModelOutput
        return type(result)(**{key: _cut(value, kept, length, batch) for key, value in result.items()})
    return result


def _taken(sequence: Tensor, kept: Kept) -> Tensor:
    """Positions of a sequence [batch, length, ...]."""
    if isinstance(kept, slice):
        return sequence[:, kept]
    index = kept.view(*kept.shape, *(1 for _ in sequence.shape[2:]))
    return sequence.gather(1, index.expand(*kept.shape, *sequence.shape[2:]))
