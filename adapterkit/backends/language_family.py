"""What a family of language models is: its classes, its table of points, and how its attention is reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adapterkit.backend import AttentionSeam
from adapterkit.backends.family import Group
from adapterkit.backends.transformers_attention import TransformersAttentionSeam
from adapterkit.points import Span


def _any_config(config: Any) -> bool:
    return True


@dataclass(frozen=True)
class Family:
    """The models that share one layout.

    Attributes:
        classes: Classes in transformers; models derived from one of them are of this family.
        groups: Where its points are.
        seam: How its attention is reached.
        when: Which of these models, by their config, where the config chooses between layouts.
    """

    classes: tuple[str, ...]
    groups: tuple[Group, ...]
    seam: type[AttentionSeam] = TransformersAttentionSeam
    when: Callable[[Any], bool] = _any_config


def grouped_heads(rows: int, groups: int, head_dim: int) -> list[Span]:
    """Rows of queries, keys and values in a projection fused group by group.

    Every group holds its queries' heads, then one head of keys and one of values: [groups, queries + 2, head_dim].
    With one query head per group this is the per-head order of GPT-NeoX; with one group, multi-query attention.

    Args:
        rows: All rows of the projection.
        groups: Heads of keys.
        head_dim: Rows of one head.
    """
    step = rows // groups
    parts = ((0, step - 2 * head_dim), (step - 2 * head_dim, head_dim), (step - head_dim, head_dim))
    return [Span(start, size, groups, step) if groups > 1 else Span(start, size) for start, size in parts]
