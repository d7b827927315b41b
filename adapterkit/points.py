"""Injection points: the named places of a model where an adapter can act. Torch-free.

A point is a description, not a module: a role from one vocabulary for all model families, the path of the module
that does the work, and a layout that says what an adapter must know to act there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, overload

Kind = Literal["weight", "norm", "output", "attention", "tokens"]
KINDS: tuple[Kind, ...] = ("weight", "norm", "output", "attention", "tokens")

Form = Literal["linear", "linear_t", "conv", "embedding", "norm"]
Access = Literal["call", "read", "any"]
Tag = str | int


@dataclass(frozen=True)
class Span:
    """The rows of a fused projection's output that belong to one point.

    The output's last axis (the channel axis of a convolution) is read as `count` groups of `step` rows; the span
    is rows `start : start + size` of every group. A contiguous span is one group: timm's value is
    `Span(2 * d, d)`; GPT-NeoX's per-head query is `Span(0, head_dim, count=heads, step=3 * head_dim)`.

    Attributes:
        start: First row of the span inside each group.
        size: Rows of the span inside each group.
        count: Number of groups.
        step: Rows in a group, or None where there is one group.
    """

    start: int
    size: int
    count: int = 1
    step: int | None = None

    @property
    def features(self) -> int:
        """The number of rows in all."""
        return self.size * self.count


@dataclass(frozen=True)
class WeightLayout:
    """What a weight point's module computes, so that an adapter's factors can compute alike.

    Attributes:
        form: `linear` [out, in]; `linear_t` [in, out] (transformers' Conv1D); `conv`; `embedding` [in, out]; `norm`
            [features], at norm points, whose weight is always read.
        bias: Whether the module has a bias.
        kernel, stride, dilation: One entry per spatial axis; empty where there is none.
        padding: Entries per axis, or torch's "same" or "valid".
        padding_mode: torch's name of the mode.
        groups: Convolution groups.
        scale: Factor on an embedding's rows (Gemma multiplies by sqrt(d)); 1 elsewhere.
        access: How the model uses the weight: it `call`s the module, or it `read`s the parameter and computes with it
            elsewhere. A weight that is read can only take adapters that have an equivalent weight. `any` where it is
            not known: adapters act on the call, and on what is read during a forward of the model.
        parameter: The parameter's name in its module.
        bias_parameter: The name of its bias.
        index: For a stack of weights in one parameter (experts): this one's place along the first axis.
    """

    form: Form
    bias: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    groups: int = 1
    scale: float = 1.0
    access: Access = "call"
    parameter: str = "weight"
    bias_parameter: str = "bias"
    index: int | None = None


@dataclass(frozen=True)
class OutputLayout:
    """Where a sublayer's neighbours are: the paths (relative to the component) that give an adapter its inputs.

    Attributes:
        residual: Module whose first input is the residual stream before the sublayer.
        norm_in: Norm between the residual stream and the sublayer (pre-norm blocks), or None.
        norm_out: Norm over sublayer output plus residual (post-norm blocks), or None.
        whole: Whether it is a whole block, whose output is the residual stream itself.
    """

    residual: str
    norm_in: str | None = None
    norm_out: str | None = None
    whole: bool = False


@dataclass(frozen=True)
class AttentionLayout:
    """Keys are [batch, kv_heads, length, head_dim], values [batch, kv_heads, length, value_width].

    Attributes:
        kv_heads: Heads of keys and values, which grouped-query attention has fewer of.
        head_dim: Width of one head; not always hidden size / heads.
        value_dim: Width of one head's values, where it is another (latent attention); None where it is `head_dim`.
        source: Width of the tokens that the keys and the values are made from, each by one layer that is a point too;
            None where there are no such layers. Found for every family alike.
    """

    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    source: int | None = None

    @property
    def value_width(self) -> int:
        """Width of one head's values."""
        return self.head_dim if self.value_dim is None else self.value_dim


@dataclass(frozen=True)
class TokensLayout:
    """The embedded sequence [batch, length, features] can be changed.

    Attributes:
        extendable: Whether the family accepts a longer sequence than the embedding made.
        lengthens: Whether this point makes it longer: the adapter is asked for further positions (`lengthen`), which
            nothing outside of the point's module sees.
        masked: Whether each row of a batch can have positions of its own, since the family masks the others'.
        until: Where no one module runs on the longer sequence: the path of the one before which it ends. The positions
            are put behind what the point's module returns, and taken off what enters the module at this path. None
            where the backend's `reach` gives a `lengthening`.
        whole: Path of the model around, where it returns what happens in between (hidden states, attentions): they are
            taken off there too. None where it does not.
    """

    extendable: bool = False
    lengthens: bool = False
    masked: bool = False
    until: str | None = None
    whole: str | None = None


@dataclass(frozen=True)
class InjectionPoint:
    """A place where an adapter can act. Its class says what can act there: one of those below.

    Attributes:
        role: From the vocabulary, such as `attn.q`.
        path: Dotted path of the module inside its component.
        site: The place inside the component in canonical words, stable across library versions: `3`, `down.0.1.0`.
        in_features, out_features: Widths of the (whole) input and of this point's output; for a convolution channels.
        layout: What an adapter must know to act there.
        span: The rows of a fused projection, or None for all of them.
        in_span: The part of the input that this point sees, where an output projection is fused with another's (Flux's
            single blocks); None for all of it. `in_features` is the width of that part.
        tags: `component`, `layer`, `stage`, `stream`, `expert`: what selectors filter on.
    """

    kind: ClassVar[Kind]
    """The class in one word, as a config's `kinds` says it."""

    role: str
    path: str
    site: str
    in_features: int
    out_features: int
    layout: Any
    span: Span | None = None
    in_span: Span | None = field(default=None, kw_only=True)
    tags: Mapping[str, Tag] = field(default_factory=dict[str, Tag], hash=False)

    @property
    def component(self) -> str:
        """The model this point lies in: `language`, `vision`, `unet`, `text_encoder`, ..."""
        return str(self.tags.get("component", "model"))

    @property
    def id(self) -> str:
        """`role@component.site`: unique in a model, and what checkpoints are keyed by."""
        return f"{self.role}@{self.component}" + (f".{self.site}" if self.site else "")

    @property
    def full_path(self) -> str:
        """Component and path, as a reader of a pipeline would write it."""
        return f"{self.component}.{self.path}" if self.path else self.component

    @property
    def shape(self) -> tuple[int, ...]:
        """A weight as adapters see it, [out, in / groups, *kernel], a norm's [features]; elsewhere (out, in)."""
        return (self.out_features, self.in_features)

    @property
    def feature_axis(self) -> int:
        """The axis of the point's output that holds `out_features`: before the spatial axes of a convolution."""
        return -1

    # What only some points have, as it is of those that do not have it.

    @property
    def form(self) -> Form | None:
        """The form of the weight; None where there is none."""
        return None

    @property
    def is_linear(self) -> bool:
        """Whether the weight is a matrix that multiplies features, in either order of memory."""
        return self.form in ("linear", "linear_t")

    @property
    def is_read(self) -> bool:
        """Whether the model reads the weight and never calls the module: only an equivalent weight can act there."""
        return False

    @property
    def cuts_groups(self) -> bool:
        """Whether it is a part of the rows of a grouped convolution, which has no weight of one factor."""
        return False

    @property
    def lengthens(self) -> bool:
        """Whether an adapter is asked for further positions here; see `TokensLayout`."""
        return False

    @property
    def is_block(self) -> bool:
        """Whether it is a whole block, whose output is the residual stream itself."""
        return False


@dataclass(frozen=True)
class ParameterPoint(InjectionPoint):
    """A place that has a weight of its own: what `WeightPoint` and `NormPoint` have alike."""

    layout: WeightLayout

    @property
    def form(self) -> Form:
        """See `WeightLayout`."""
        return self.layout.form

    @property
    def is_read(self) -> bool:
        return self.layout.access == "read"

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names in the module of the weight and, where there is one, of the bias."""
        return tuple(name for name in (self.layout.parameter, self.layout.bias_parameter) if name)


@dataclass(frozen=True)
class WeightPoint(ParameterPoint):
    """A Linear, Conv1D, convolution, embedding or expert, or a part of one."""

    kind: ClassVar[Kind] = "weight"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features // self.layout.groups, *self.layout.kernel)

    @property
    def feature_axis(self) -> int:
        return -1 - len(self.layout.kernel)

    @property
    def cuts_groups(self) -> bool:
        return self.layout.groups > 1 and self.span is not None


@dataclass(frozen=True)
class NormPoint(ParameterPoint):
    """A norm's gain and shift, which are always read."""

    kind: ClassVar[Kind] = "norm"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.out_features,)


@dataclass(frozen=True)
class OutputPoint(InjectionPoint):
    """The output of a sublayer, before it is added to the residual stream, or of a block."""

    kind: ClassVar[Kind] = "output"
    layout: OutputLayout

    @property
    def is_block(self) -> bool:
        return self.layout.whole


@dataclass(frozen=True)
class AttentionPoint(InjectionPoint):
    """The keys and values of an attention."""

    kind: ClassVar[Kind] = "attention"
    layout: AttentionLayout


@dataclass(frozen=True)
class TokensPoint(InjectionPoint):
    """An embedded sequence."""

    kind: ClassVar[Kind] = "tokens"
    layout: TokensLayout

    @property
    def lengthens(self) -> bool:
        return self.layout.lengthens


LAYOUTS: Mapping[type[InjectionPoint], type] = {
    WeightPoint: WeightLayout,
    NormPoint: WeightLayout,
    OutputPoint: OutputLayout,
    AttentionPoint: AttentionLayout,
    TokensPoint: TokensLayout,
}
"""The classes of points, each with that of its layout."""


class Points(Sequence[InjectionPoint]):
    """An immutable list of points that prints as a table."""

    def __init__(self, points: Iterable[InjectionPoint], costs: Mapping[str, int] | None = None) -> None:
        self._points = tuple(points)
        self._costs = dict(costs or {})

    @overload
    def __getitem__(self, index: int) -> InjectionPoint: ...
    @overload
    def __getitem__(self, index: slice) -> Points: ...
    def __getitem__(self, index: int | slice) -> InjectionPoint | Points:
        if isinstance(index, slice):
            return Points(self._points[index], self._costs)
        return self._points[index]

    def __len__(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[InjectionPoint]:
        return iter(self._points)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Points) and self._points == other._points

    __hash__ = None  # type: ignore[assignment]

    @property
    def ids(self) -> list[str]:
        """The ids, in model order."""
        return [point.id for point in self._points]

    @property
    def costs(self) -> Mapping[str, int]:
        """Parameters that the asked-for adapter would add, by point id; empty where none was asked for."""
        return self._costs

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [("role", "kind", "path", "shape", "parameters")]
        for point in self._points:
            cost = self._costs.get(point.id)
            rows.append(
                (
                    point.role,
                    point.kind,
                    point.full_path,
                    "x".join(map(str, point.shape)),
                    f"{cost:,}" if cost is not None else "",
                )
            )
        if not self._costs:
            rows = [row[:-1] for row in rows]  # type: ignore[misc]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = f", {sum(self._costs.values()):,} parameters" if self._costs else ""
        return "\n".join([*lines, f"{len(self)} points{total}"])
