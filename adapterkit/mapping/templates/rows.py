"""The rows of a projection that makes several things, where they lie head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterkit.points import Span

QKV = ("*.q", "*.k", "*.v")
_COUNTS = ("num_attention_heads", "num_heads", "n_head")


def heads_of(attention: Any) -> int:
    """How many heads of queries a module has; an error where it does not tell, as its forward would give."""
    if isinstance(width := getattr(attention, "head_size", None), int):  # GPT-NeoX
        return attention.dense.in_features // width
    return next(int(count) for name in _COUNTS if isinstance(count := getattr(attention, name, None), int))


def side_by_side(*sizes: int, count: int = 1, step: int | None = None) -> list[Span]:
    """Spans of these sizes, one behind the other, `count` times at distances of `step`."""
    return [Span(sum(sizes[:i]), size, count, step) for i, size in enumerate(sizes)]


def by_heads(attention: Any, rows: int) -> Sequence[Span]:
    """Rows [heads, queries + keys + values]: of one width, or keys and queries of `key_dim`."""
    heads = heads_of(attention)
    step = rows // heads
    narrow = getattr(attention, "key_dim", step // 3)
    return side_by_side(narrow, narrow, step - 2 * narrow, count=heads, step=step)


def pairs_by_heads(attention: Any, rows: int) -> Sequence[Span]:
    """Rows [heads, keys + values], where queries are made elsewhere."""
    heads, narrow = heads_of(attention), attention.key_dim
    return side_by_side(narrow, rows // heads - narrow, count=heads, step=rows // heads)
