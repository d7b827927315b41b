"""What an adapter is given as its base at a point: what the point computed before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.adapter import Base
from adapterkit.engine.context import Side, no_side
from adapterkit.errors import AttachError
from adapterkit.kernels.spans import read_span, write_spans
from adapterkit.kernels.weights import call_weight
from adapterkit.points import InjectionPoint, ParameterPoint, Span

ReadBase = Callable[[], tuple[Tensor | None, Tensor | None]]
"""Gives the weight and bias of a point's base."""


class Frozen:
    """The weight and bias of a weight point's base, and its side inputs: those of the whole.

    Attributes:
        by_rows: Whether it may be asked for some rows of the batch alone.
    """

    by_rows: bool = False

    def __init__(self, whole: Base, point: InjectionPoint, read: ReadBase) -> None:
        self._whole, self._point, self._read = whole, point, read

    @property
    def context(self) -> Mapping[str, Tensor]:
        return self._whole.context

    @property
    def weight(self) -> Tensor:
        weight, _ = self._read()
        if weight is None or not weight.is_floating_point():
            raise AttachError("the adapter reads the base's weight, and there is no dense one (a quantized layer?)")
        return weight

    @property
    def bias(self) -> Tensor | None:
        return self._read()[1]

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not isinstance(self._point, ParameterPoint):
            raise TypeError(f"{self._point.id} is no weight point")
        return call_weight(x, weight, bias, self._point.layout)


class Computed:
    """A base that is computed at most once for the input the model gave, and anew for any other.

    Args:
        compute: Computes it.
        x: The input that the model gave.
        side: The side inputs.
        y: What it gave for x, where that is known.
    """

    def __init__(
        self, compute: Callable[[Tensor], Tensor], x: Tensor, side: Side = no_side, y: Tensor | None = None
    ) -> None:
        self._compute, self._x, self._side, self._y = compute, x, side, y

    def __call__(self, x: Tensor, /) -> Tensor:
        if x is not self._x:
            return self._compute(x)
        if self._y is None:
            self._y = self._compute(x)
        return self._y

    @property
    def context(self) -> Mapping[str, Tensor]:
        return self._side(self._x)


class WholeBase(Computed, Frozen):
    """The base of a weight point that is the whole module."""

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        x: Tensor,
        side: Side,
        point: InjectionPoint,
        read: ReadBase,
        *,
        by_rows: bool = False,
    ) -> None:
        # Not by the two classes' own: this is made in every call.
        self._compute, self._x, self._side, self._y = compute, x, side, None
        self._point, self._read, self.by_rows = point, read, by_rows


class PartBase(Frozen):
    """The base of a point that sees only a part of the input: asked for that part, it answers for the whole input.

    Args:
        whole: The base of the whole input `x`.
        x: That input.
        part: The part of it that the point sees.
        span: Where the part lies.
        point: The point.
        read: Its weight.
    """

    def __init__(self, whole: Base, x: Tensor, part: Tensor, span: Span, point: InjectionPoint, read: ReadBase) -> None:
        super().__init__(whole, point, read)
        self._x, self._part, self._span = x, part, span

    def __call__(self, x: Tensor, /) -> Tensor:
        return self._whole(self._x if x is self._part else write_spans(self._x, [(self._span, x)], -1))

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `adapterkit.adapter.WeightBase`: the base's output is that of other inputs too."""
        y = self(x) + F.linear(x, weight - self.weight)
        return y if bias is None else y + (bias if self.bias is None else bias - self.bias)


class SpanBase(Frozen):
    """The rows of a base's output that belong to one point."""

    def __init__(self, whole: Base, span: Span, dim: int, point: InjectionPoint, read: ReadBase) -> None:
        super().__init__(whole, point, read)
        self._span, self._dim = span, dim

    def __call__(self, x: Tensor, /) -> Tensor:
        return read_span(self._whole(x), self._span, self._dim)


class SublayerBase:
    """The base at an output point: a sublayer that has already run, and the norms next to it."""

    def __init__(
        self,
        x: Tensor,
        output: Tensor,
        norm_in: nn.Module | None,
        norm_out: nn.Module | None,
        side: Side = no_side,
        *,
        channels_first: bool = False,
    ) -> None:
        self._x, self._output, self._norm_in, self._norm_out = x, output, norm_in, norm_out
        self._side, self._first = side, channels_first

    def __call__(self, x: Tensor, /) -> Tensor:
        if x is not self._x:
            raise ValueError("at an output point base(x) can only be asked for the x that forward was given")
        return self._output

    @property
    def context(self) -> Mapping[str, Tensor]:
        return self._side(self._x)

    # The norms' forwards are called bare: their hooks belong to the model's own call.
    def norm_in(self, x: Tensor) -> Tensor:
        """The pre-norm, or `x` itself in a post-norm block."""
        return self._normed(self._norm_in, x)

    def norm_out(self, x: Tensor) -> Tensor:
        """The post-norm, or `x` itself in a pre-norm block."""
        return self._normed(self._norm_out, x)

    def _normed(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        if norm is None:
            return x
        return norm.forward(x.movedim(-1, 1)).movedim(1, -1) if self._first else norm.forward(x)
