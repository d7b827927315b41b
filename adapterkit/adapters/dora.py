"""DoRA: a low-rank update of a weight's direction, and a magnitude for each of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterModule, Base, WeightBase
from adapterkit.adapters.lora import LoRA
from adapterkit.adapters.low_rank import LowRank
from adapterkit.kernels import low_rank
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


@dataclass(frozen=True)
class DoRA(LoRA):
    """`W' = m (W + s B A) / ||W + s B A||`, row by row (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    The magnitudes m start as the norms of W's rows, so that the effect is zero. The other options are LoRA's; dropout
    reaches the update alone.

    Attributes:
        scale_bias: Whether `m / ||...||` scales the bias too; the paper has none.
        plain_norm: Whether the norm is that of `W + B A`, whatever s is.
    """

    exact_gradients: ClassVar[bool] = False  # the norms count as constant
    scale_bias: bool = False
    plain_norm: bool = False

    def accepts(self, point: InjectionPoint) -> str | None:
        if point.form == "embedding":
            return "DoRA scales the rows of a weight that multiplies features, and an embedding takes indices; use LoRA"
        if point.in_span is not None:
            return "DoRA scales all that a projection gives, and this point has a part of its input; use LoRA"
        return super().accepts(point)

    def build(self, point: InjectionPoint) -> AdapterModule:
        return DoRAModule(*self.arguments(point), scale_bias=self.scale_bias, plain_norm=self.plain_norm)
