"""(IA)3 as LyCORIS has it: a factor for every row, or column, of a weight; the bias is left (arXiv:2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base, WeightBase
from adapterkit.kernels.weights import call_weight
from adapterkit.points import Kind, WeightPoint


class ScaledWeightModule(ak.AdapterModule):
    """`W' = W (1 + w)`: w [out] scales rows, or [in / groups] columns; it starts at zero."""

    def __init__(self, point: ak.InjectionPoint, on_input: bool) -> None:
        super().__init__()
        self.layout, self.on_input = point.layout, on_input
        self.weight = nn.Parameter(torch.zeros(point.shape[1 if on_input else 0]))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        frozen = cast("WeightBase", base)
        weight, bias = self.merged(frozen.weight, frozen.bias)
        weight = weight if self.layout.form == "embedding" else weight.to(x.dtype)  # an embedding takes indices
        return call_weight(x, weight, bias, self.layout)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`."""
        shape = [1] * weight.ndim
        shape[1 if self.on_input else 0] = -1
        return weight * (1 + self.weight.to(weight.dtype).view(shape)), bias


@dataclass(frozen=True)
class ScaledWeight(ak.AdapterConfig):
    """`W (1 + w)`, row by row or column by column. Unlike `IA3`, it leaves the bias as it is.

    Attributes:
        on_input: Whether columns are scaled.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attn.{k,v} mlp.down"
    on_input: bool = False

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if isinstance(point, WeightPoint) and (point.cuts_groups or point.in_span is not None):
            return "it scales rows or columns of whole layers"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> ScaledWeightModule:
        return ScaledWeightModule(point, self.on_input)
