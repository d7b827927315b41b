"""The entries of a family table: what is where, relative to a block.

Paths list alternatives separated by `|`, so that a module that the next release of a library renames is one more word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapterkit.errors import PluginError
from adapterkit.points import Form, Span

SplitRows = Callable[[nn.Module, int], Sequence[Span]]
"""Spans of a fused projection, from the block that holds it and the number of its rows."""


def _is_path(value: object) -> bool:
    return isinstance(value, str)


def _is_optional_path(value: object) -> bool:
    return value is None or isinstance(value, str)


def _are_roles(value: object) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(role, str) for role in value)


_TEXT = (_is_path, "a string")
_OPTIONAL = (_is_optional_path, "a path, or None")
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "roles": (_are_roles, "a tuple of roles, such as ('attn.q', 'attn.k')"),
    "split": (lambda value: value is None or callable(value), "a function of (block, rows), or None"),
    "heads": (callable, "a function of the attention module"),
    "norm_in": _OPTIONAL,
    "norm_out": _OPTIONAL,
    "width": _OPTIONAL,
    "convolved": _OPTIONAL,
    "extendable": (lambda value: isinstance(value, bool), "True or False"),
}


class _Checked:
    """What all entries do: a slip in a table is an error where the table is written."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            fits, expected = _EXPECTED.get(field.name, _TEXT)
            if not fits(value):
                raise PluginError(f"{type(self).__name__}: {field.name} must be {expected}, not {value!r}")


@dataclass(frozen=True)
class Weight(_Checked):
    """One projection, convolution or embedding."""

    role: str
    path: str


@dataclass(frozen=True)
class Fused(_Checked):
    """Several projections in one module, in the order of their rows; in equal parts unless `split` says otherwise."""

    roles: tuple[str, ...]
    path: str
    split: SplitRows | None = None


@dataclass(frozen=True)
class FusedInput(_Checked):
    """One projection of several inputs side by side: a point for each part of the input. Equal parts unless `split`."""

    roles: tuple[str, ...]
    path: str
    split: SplitRows | None = None


@dataclass(frozen=True)
class Read(_Checked):
    """A weight that the model reads instead of calling its module. `form` is the `Form` of its layout."""

    role: str
    path: str
    parameter: str = "weight"
    bias: str = "bias"
    form: Form = "linear"


@dataclass(frozen=True)
class Experts(_Checked):
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
class Output(_Checked):
    """A sublayer's output, at the module `core` that computes it last. Paths as in `OutputLayout`.

    `width` is a module that takes inputs of the residual stream's width, where neither norms nor `residual` tell it.
    `convolved` is a part of the sublayer: where it holds a convolution, and no linear layer before it, the features are
    at dimension 1.
    """

    role: str
    core: str
    residual: str
    norm_in: str | None = None
    norm_out: str | None = None
    width: str | None = None
    convolved: str | None = None


@dataclass(frozen=True)
class Attention(_Checked):
    """A module whose keys and values can be extended.

    `heads` gives (kv_heads, head_dim) of it, or (kv_heads, head_dim, value_dim) where keys and values differ in width.
    """

    role: str
    path: str
    heads: Callable[[nn.Module], tuple[int, int] | tuple[int, int, int]]


@dataclass(frozen=True)
class Tokens(_Checked):
    """The module that makes the embedded sequence."""

    role: str
    path: str
    extendable: bool = False


@dataclass(frozen=True)
class Block(_Checked):
    """What the templates say of a block, or of a sublayer: see `adapterkit.mapping.templates`.

    `without` are roles that they say and that are left out, separated by spaces.
    """

    without: str = ""


Entry = Weight | Fused | FusedInput | Read | Experts | Output | Attention | Tokens | Block


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
