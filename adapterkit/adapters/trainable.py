"""Training parts of the model itself, as an adapter: whole weights, biases, norms, single rows, a new head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule, Base, WeightBase
from adapterkit.errors import did_you_mean
from adapterkit.kernels.weights import call_weight
from adapterkit.points import InjectionPoint, Kind, ParameterPoint

PARTS = ("all", "weight", "bias")
INITS = ("base", "fresh")
_MAX_ROWS, _MAX_OUTPUTS = 2**16, 2**20


class FullWeight(AdapterModule):
    """A weight of its own in the place of the base's, and a bias: they hold the values themselves, not changes.

    Args:
        point: Where; `weight` has the point's shape.
        bias: Whether there is a `bias` [out] too.
        fresh: Start as a new layer, not from the base's values.
    """

    def __init__(self, point: InjectionPoint, bias: bool, fresh: bool) -> None:
        super().__init__()
        self.layout, self.fresh = point.layout, fresh
        self.partial = point.in_span is not None
        self.weight = nn.Parameter(torch.ones(point.shape))
        self.bias = nn.Parameter(torch.zeros(point.out_features)) if bias else None
        if len(point.shape) > 1:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: a copy of the base's values."""
        if self.fresh:
            return
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        frozen = cast("WeightBase", base)
        if self.partial:  # the base's output is that of other inputs too
            y = base(x)
            return y + F.linear(x, self.weight.to(x.dtype) - frozen.weight)
        dtype = frozen.weight.dtype
        bias = frozen.bias if self.bias is None else self.bias.to(dtype)
        return call_weight(x, self.weight.to(dtype), bias, self.layout)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.weight.to(weight.dtype), bias if self.bias is None else self.bias.to(weight.dtype)


class BiasShift(AdapterModule):
    """`y = base(x) + shift`; shift [out] starts at zero."""

    def __init__(self, point: InjectionPoint) -> None:
        super().__init__()
        self.axis = point.feature_axis
        self.shift = nn.Parameter(torch.zeros(point.out_features))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return y + self.shift.to(y.dtype).view(-1, *(1,) * (-1 - self.axis))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shift = self.shift.to(weight.dtype)
        return weight, shift if bias is None else bias + shift


class OwnBias(AdapterModule):
    """A bias [out] of its own in the place of the base's, or where there was none: the values themselves."""

    def __init__(self, point: InjectionPoint) -> None:
        super().__init__()
        self.axis = point.feature_axis
        self.bias = nn.Parameter(torch.zeros(point.out_features))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: a copy of the base's bias, zeros where it has none."""
        if bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, frozen = base(x), cast("WeightBase", base).bias
        own = self.bias.to(y.dtype)
        return y + (own if frozen is None else own - frozen).view(-1, *(1,) * (-1 - self.axis))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.bias.to(weight.dtype)


class Rows(AdapterModule):
    """Rows of its own in the place of some of the base's: of an embedding's vectors, or of a projection's outputs.

    Args:
        point: Where.
        rows: Which; `values` is [rows, width].
    """

    def __init__(self, point: InjectionPoint, rows: Sequence[int]) -> None:
        super().__init__()
        self.layout = point.layout
        self.embeds = self.layout.form == "embedding"
        width = point.out_features if self.embeds else point.in_features
        self.values = nn.Parameter(torch.zeros(len(rows), width))
        self.register_buffer("rows", torch.tensor(rows), persistent=False)

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        rows = cast("Tensor", self.rows)
        self.values.copy_(weight[:, rows].mT if self.embeds else weight[rows])

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, rows = base(x), cast("Tensor", self.rows)
        values = self.values.to(y.dtype)
        if not self.embeds:
            bias = cast("WeightBase", base).bias
            own = F.linear(x.to(y.dtype), values, None if bias is None else bias[rows])
            return y.index_copy(-1, rows, own)
        matches = x[..., None] == rows
        own = F.embedding(matches.int().argmax(-1), values) * self.layout.scale
        return torch.where(matches.any(-1, keepdim=True), own, y)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows, values = cast("Tensor", self.rows), self.values.to(weight.dtype)
        return weight.index_copy(1, rows, values.mT) if self.embeds else weight.index_copy(0, rows, values), bias


class NewHead(AdapterModule):
    """`y = W x + b` in the place of the base, with another number of outputs: W [outputs, in], b [outputs]."""

    scalable = False

    def __init__(self, point: InjectionPoint, outputs: int) -> None:
        super().__init__()
        layer = nn.Linear(point.in_features, outputs)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        dtype = cast("WeightBase", base).weight.dtype
        return F.linear(x, self.weight.to(dtype), self.bias.to(dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`: a weight of another shape."""
        return self.weight.to(weight.dtype), self.bias.to(weight.dtype)


@dataclass(frozen=True)
class Trainable(AdapterConfig):
    """The model's own parameters, trained in a copy: switched, saved, merged and taken off like any adapter.

        Trainable("head")                           the classification head; with outputs=10, a new one of ten classes
        Trainable("norm")                           every norm's gain and shift
        Trainable("all norm", part="bias")          every bias (BitFit: Ben Zaken et al. 2022, arXiv:2106.10199)
        Trainable("embed.tokens", rows=(5, 9))      the vectors of two tokens
        Trainable("mlp.*@layer>=10")                whole weights

    Where head and embedding are tied, each gets values of its own: name both to train both.

    Attributes:
        part: "weight", "bias" (of those points that have one) or "all".
        absolute: With part="bias", whether the bias itself is held, and not a change of the base's. A layer that has
            none then gets one.
        rows: Single rows: of an embedding by index, of a projection by output.
        outputs: A new projection with this many outputs in the place of the base's, alone at its point. A loss that the
            model computes itself goes on counting the base's outputs (transformers' `config.num_labels`).
        init: "base" starts from the base's values, "fresh" as a new layer does.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight", "norm"})
    targets: str = "head"
    part: str = "all"
    absolute: bool = field(default=False, kw_only=True)
    rows: tuple[int, ...] | None = None
    outputs: int | None = None
    init: str = "base"

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        """Whether it starts from the base's values."""
        return self.init == "base" and self.outputs is None

    def problems(self) -> list[str]:
        found = [*_choice("part", self.part, PARTS), *_choice("init", self.init, INITS)]
        if self.rows is not None and not _are_rows(self.rows):
            found.append(f"rows must be a tuple of different whole numbers from 0, not {str(self.rows)[:80]}")
        if self.outputs is not None and not 1 <= self.outputs <= _MAX_OUTPUTS:
            found.append(f"outputs must be from 1 to {_MAX_OUTPUTS}, not {self.outputs!r}")
        if self.rows is not None and (self.outputs is not None or self.part == "bias" or self.init == "fresh"):
            found.append("rows goes with neither outputs, part='bias' nor init='fresh'")
        if self.outputs is not None and self.part != "all":
            found.append(f"outputs makes a new weight and bias, so part must be 'all', not {self.part!r}")
        if self.absolute and self.part != "bias":
            found.append(f"absolute speaks of biases, so part must be 'bias', not {self.part!r}")
        if self.part == "bias" and self.init == "fresh":
            found.append("part='bias' trains a change of the base's bias, so init must be 'base'")
        return found

    def narrow(self, points: Sequence[InjectionPoint]) -> Sequence[InjectionPoint]:
        """See `AdapterConfig.narrow`: for changes of biases, the points that have one; of several, the first."""
        if self.part != "bias":
            return points
        found = [point for point in points if point.layout.bias or self.absolute]
        first = {(point.model, point.path): point for point in reversed(found) if point.in_span is not None}
        return [point for point in found if point.in_span is None or point is first[point.model, point.path]]

    def accepts(self, point: InjectionPoint) -> str | None:
        if not isinstance(point, ParameterPoint):
            return super().accepts(point)
        form, access = point.layout.form, point.layout.access
        if self.absolute and point.form == "embedding":
            return "an embedding has no bias"
        if self.rows is not None:
            count = point.in_features if form == "embedding" else point.out_features
            if form in ("conv", "norm"):
                return f"rows are of embeddings and projections, and this is a {form}"
            if max(self.rows) >= count:
                return f"it has {count} rows, and row {max(self.rows)} is asked for"
        if self.outputs is not None and point.role.partition(".")[0] != "head":
            return "what takes its output expects the base's width: only a head can have another number of outputs"
        if self.outputs is not None and (form != "linear" or access == "read" or point.span or point.in_span):
            return "outputs makes a new projection, and this is not a whole linear layer that is called"
        if (self.part == "all" or self.absolute) and point.in_span is not None and point.layout.bias:
            return "its bias is another point's too: set part='weight'"
        return super().accepts(point)

    def build(self, point: InjectionPoint) -> AdapterModule:
        if self.rows is not None:
            return Rows(point, self.rows)
        if self.outputs is not None:
            return NewHead(point, self.outputs)
        if self.part == "bias":
            return OwnBias(point) if self.absolute else BiasShift(point)
        bias = self.part == "all" and point.layout.bias
        return FullWeight(point, bias, self.init == "fresh")


def _are_rows(rows: object) -> bool:
    return (
        isinstance(rows, tuple)
        and 0 < len(rows) <= _MAX_ROWS
        and len(set(rows)) == len(rows)
        and all(type(row) is int and row >= 0 for row in rows)
    )


def _choice(name: str, value: str, known: Sequence[str]) -> list[str]:
    return (
        []
        if value in known
        else [f"{name} must be one of {', '.join(known)}, not {value!r}.{did_you_mean(value, known)}"]
    )
