"""DoRA: a low-rank update of a weight's direction, and a magnitude for each of its rows."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterModule, Base, WeightBase
from adapterkit.adapters.lora import LoRA
from adapterkit.adapters.low_rank import LowRank
from adapterkit.kernels import low_rank
from adapterkit.kernels.weights import call_weight
from adapterkit.points import InjectionPoint


class DoRAModule(LowRank):
    """`y = b + m / n * (W x + update(x))`, with `n` the norms of the rows of the W that has it; see `DoRA`."""

    def __init__(
        self, point: InjectionPoint, *arguments: object, scale_bias: bool = False, plain_norm: bool = False
    ) -> None:
        super().__init__(point, *arguments)  # type: ignore[arg-type]
        self.axis, self.from_base = point.feature_axis, True
        self.scale_bias, self.plain_norm = scale_bias, plain_norm
        self.magnitude = nn.Parameter(torch.ones(point.out_features))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: the magnitudes are the norms of the weight's rows."""
        super().initialise(weight, bias)
        self.magnitude.copy_(self.norms(weight))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, bias = base(x), cast("WeightBase", base).bias
        shape = (-1, *(1,) * (-1 - self.axis))
        ratio = (self.magnitude / self.norms(cast("WeightBase", base).weight)).view(shape)
        direction = y if bias is None or self.scale_bias else y - bias.view(shape)
        # The ratio is near 1: in half precision its distance from 1 would be lost before the subtraction.
        return y + (ratio - 1).to(y.dtype) * direction + ratio.to(y.dtype) * self.update(x).to(y.dtype)

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        """Norms [out] of the rows of `W + s B A`, from the factors: the dense product is never formed.

        ||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B, row by row; constant for the gradient, as in the paper (4.3).
        """
        wide = torch.promote_types(torch.promote_types(self.A.dtype, weight.dtype), torch.float32)
        matrix = weight.flatten(1)
        product = self.product()
        a, b, scale = product.A.flatten(1), product.B.to(wide), 1.0 if self.plain_norm else product.scale
        own = torch.linalg.vector_norm(matrix, dim=1, dtype=wide).square()
        cross = ((matrix @ a.to(matrix.dtype).mT).to(wide) * b).sum(1)
        square = ((b @ (a.to(wide) @ a.to(wide).mT)) * b).sum(1)
        return (own + 2 * scale * cross + scale**2 * square).clamp_min(torch.finfo(wide).tiny).sqrt()

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`."""
        ratio = (self.magnitude / self.norms(weight)).to(weight.dtype)
        shape = (-1, *(1 for _ in weight.shape[1:]))
        merged = low_rank.added(weight, self.product()) * ratio.view(shape)
        return merged, bias * ratio if self.scale_bias and bias is not None else bias


class ColumnDoRAModule(LowRank):
    """The same with norms over the outputs of each input, and over the kernel's places: see `DoRA.over`."""

    def __init__(self, point: InjectionPoint, *arguments: object) -> None:
        super().__init__(point, *arguments)  # type: ignore[arg-type]
        self.from_base = True
        self.magnitude = nn.Parameter(torch.ones(point.shape[1]))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: the magnitudes are the norms of the weight's columns."""
        super().initialise(weight, bias)
        self.magnitude.copy_(_column_norms(weight).flatten())

    def forward(self, x: Tensor, base: Base) -> Tensor:
        frozen = cast("WeightBase", base)
        weight, bias = self.merged(frozen.weight, frozen.bias)
        return call_weight(x, weight.to(x.dtype), bias, self.layout)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`. The bias has no part in it."""
        changed = low_rank.added(weight, self.product())
        norms = _column_norms(changed.detach())
        return changed * (self.magnitude.to(weight.dtype).view_as(norms) / norms), bias


def _column_norms(weight: Tensor) -> Tensor:
    own = weight.movedim(1, 0).flatten(1).norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
    return own.view(1, -1, *(1,) * (weight.ndim - 2))


@dataclass(frozen=True)
class DoRA(LoRA):
    """`W' = m (W + s B A) / ||W + s B A||`, row by row (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    The magnitudes m start as the norms of W's rows, so that the effect is zero; an embedding's rows are the features of
    its vectors. The other options are LoRA's; dropout reaches the update alone.

    Attributes:
        scale_bias: Whether `m / ||...||` scales the bias too; the paper has none.
        plain_norm: Whether the norm is that of `W + B A`, whatever s is.
        over: What norms are taken over: the "inputs" of each output, as the paper has it, or the "outputs" of each
            input, with magnitudes [in / groups], as some trainers do.
    """

    exact_gradients: ClassVar[bool] = False  # the norms count as constant
    scale_bias: bool = False
    plain_norm: bool = False
    over: str = "inputs"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.over not in ("inputs", "outputs"):
            found.append(f"over must be inputs or outputs, not {self.over!r}")
        elif self.over == "outputs" and (self.dropout or self.rank_dropout or self.module_dropout):
            found.append("over='outputs' computes with the weight that has the update: set every dropout to 0")
        elif self.over == "outputs" and (self.scale_bias or self.plain_norm):
            found.append("scale_bias and plain_norm go with over='inputs'")
        return found

    def accepts(self, point: InjectionPoint) -> str | None:
        if self.across_groups and point.layout.groups > 1:
            return "DoRA scales what a weight becomes, and across_groups adds beside it"
        if point.in_span is not None:
            return "DoRA scales all that a projection gives, and this point has a part of its input; use LoRA"
        if self.over == "outputs" and point.span is not None:
            return "over='outputs' needs all outputs of a layer, and this point is a part of them"
        return super().accepts(point)

    def build(self, point: InjectionPoint) -> AdapterModule:
        if self.over == "outputs":
            return ColumnDoRAModule(*self.arguments(point))
        return DoRAModule(*self.arguments(point), scale_bias=self.scale_bias, plain_norm=self.plain_norm)

    def alike(self, point: InjectionPoint) -> tuple[Hashable, ...]:
        own = self.at(point)
        return (*super().alike(point), own.over, own.scale_bias, own.plain_norm)
