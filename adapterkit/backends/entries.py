"""The entries of a family table: what is where, relative to a block.

Paths list alternatives separated by `|`, so that a module that the next release of a library renames is one more word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from adapterkit.points import Form, Span

SplitRows = Callable[[nn.Module, int], Sequence[Span]]
"""Spans of a fused projection, from the block that holds it and the number of its rows."""


@dataclass(frozen=True)
class Weight:
    """One projection, convolution or embedding."""

    role: str
    path: str


@dataclass(frozen=True)
class Fused:
    """Several projections in one module, in the order of their rows; in equal parts unless `split` says otherwise."""

    roles: tuple[str, ...]
    path: str
    split: SplitRows | None = None


@dataclass(frozen=True)
class FusedInput:
    """One projection of several inputs side by side: a point for each part of the input. Equal parts unless `split`."""

    roles: tuple[str, ...]
    path: str
    split: SplitRows | None = None


@dataclass(frozen=True)
class Read:
    """A weight that the model reads instead of calling its module. `form` is the `Form` of its layout."""

    role: str
    path: str
    parameter: str = "weight"
    bias: str = "bias"
    form: Form = "linear"


@dataclass(frozen=True)
class Experts:
    """A stack of weights in one parameter, [experts, ...]: a point for each expert and role, tagged `expert`.

    Attributes:
        roles: As in `Fused`, in the order of the rows.
        path: The module.
        parameter, bias: Names in the module.
        form: `linear` for [experts, out, in], `linear_t` for [experts, in, out].
        split: As in `Fused`.
    """

    roles: tuple[str, ...]
    path: str
    parameter: str
    bias: str = ""
    form: Form = "linear"
    split: SplitRows | None = None


@dataclass(frozen=True)
class Output:
    """A sublayer's output, at the module `core` that computes it last. Paths as in `OutputLayout`.

    `width` is a module that takes inputs of the residual stream's width, where neither norms nor `residual` tell it.
    """

    role: str
    core: str
    residual: str
    norm_in: str | None = None
    norm_out: str | None = None
    width: str | None = None


@dataclass(frozen=True)
class Attention:
    """A module whose keys and values can be extended.

    `heads` gives (kv_heads, head_dim) of it, or (kv_heads, head_dim, value_dim) where keys and values differ in width.
    """

    role: str
    path: str
    heads: Callable[[nn.Module], tuple[int, int] | tuple[int, int, int]]


@dataclass(frozen=True)
class Tokens:
    """The module that makes the embedded sequence."""

    role: str
    path: str
    extendable: bool = False


Entry = Weight | Fused | FusedInput | Read | Experts | Output | Attention | Tokens


def equal_parts(count: int, rows: int) -> list[Span]:
    """`rows` in `count` contiguous spans of one size."""
    return [Span(i * (rows // count), rows // count) for i in range(count)]


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
