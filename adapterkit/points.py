"""Injection points: the named places of a model where an adapter can act. Torch-free.

A point is a description, not a module: a role from one vocabulary for all model families, the path of the module
that does the work, and a layout that says what an adapter must know to act there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

from adapterkit.contract.layouts import Access, AttentionLayout, Form, OutputLayout, Span, TokensLayout, WeightLayout

if TYPE_CHECKING:
    from adapterkit.contract.view import ModelView

__all__ = [
    "KINDS",
    "LAYOUTS",
    "Access",
    "AttentionLayout",
    "AttentionPoint",
    "Form",
    "InjectionPoint",
    "Kind",
    "NormPoint",
    "OutputLayout",
    "OutputPoint",
    "ParameterPoint",
    "Points",
    "Span",
    "Tag",
    "TokensLayout",
    "TokensPoint",
    "WeightLayout",
    "WeightPoint",
]

Kind = Literal["weight", "norm", "output", "attention", "tokens"]
KINDS: tuple[Kind, ...] = ("weight", "norm", "output", "attention", "tokens")

Tag = str | int


@dataclass(frozen=True)
class InjectionPoint:
    """A place where an adapter can act. Its class says what can act there: one of those below.

    Attributes:
        role: From the vocabulary, such as `attn.q`.
        path: Dotted path of the module inside its model.
        site: The place inside the component in canonical words, stable across library versions: `3`, `down.0.1.0`.
        in_features, out_features: Widths of the (whole) input and of this point's output; for a convolution channels.
        layout: What an adapter must know to act there.
        span: The rows of a fused projection, or None for all of them.
        in_span: The part of the input that this point sees, where an output projection is fused with another's (Flux's
            single blocks); None for all of it. `in_features` is the width of that part.
        tags: `component`, `layer`, `stage`, `stream`, `expert`, `tower`: what selectors filter on.
        tied: Of a weight that several layers of the model at hand have, the id of the first such point; else "".
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
    tied: str = field(default="", kw_only=True, compare=False, repr=False)

    @functools.cached_property
    def component(self) -> str:
        """The model this point lies in: `language`, `vision`, `unet`, `text_encoder`, ..."""
        return str(self.tags.get("component", "model"))

    @functools.cached_property
    def model(self) -> str:
        """The name of the model in which its path begins: the component, or the one of which that is a part."""
        return str(self.tags["model"]) if "model" in self.tags else self.component

    @functools.cached_property
    def id(self) -> str:
        """`role@component.site`: unique in a model, and what checkpoints are keyed by."""
        return f"{self.role}@{self.component}" + (f".{self.site}" if self.site else "")

    @property
    def full_path(self) -> str:
        """Model and path, as a reader of a pipeline would write it."""
        return f"{self.model}.{self.path}" if self.path else self.model

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

    @property
    def channels_first(self) -> bool:
        """Whether what adapters are given here has its features at dimension 1 in the model."""
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

    @property
    def channels_first(self) -> bool:
        return self.layout.channels_first


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

    model: ModelView | None = None
    """The model that they are of, for formats; see `of`."""

    def __init__(self, points: Iterable[InjectionPoint], costs: Mapping[str, int] | None = None) -> None:
        self._points = tuple(points)
        self._costs = dict(costs or {})

    def of(self, model: ModelView) -> Points:
        """The same points with the model that they are of."""
        found = copy.copy(self)
        found.model = model
        return found

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
