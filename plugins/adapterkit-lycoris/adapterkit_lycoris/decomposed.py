"""Weight decomposition around any update: a magnitude for each row, or column, of what the weight becomes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base, WeightBase
from adapterkit.kernels.weights import call_weight

SIDES = ("output", "input")


class Decomposed(ak.AdapterModule):
    """`W' = m (W + D) / |W + D|`, the norm over the inputs of each output, or over the outputs of each input.

    Args:
        point: Where.
        update: Says D, by `delta_weight`.
        side: "output" has magnitudes [out]; "input" has them [in / groups].
    """

    def __init__(self, point: ak.InjectionPoint, update: ak.AdditiveModule, side: str) -> None:
        super().__init__()
        self.layout, self.axis, self.from_base = point.layout, SIDES.index(side), True
        self.update = update
        self.magnitude = nn.Parameter(torch.ones(point.shape[self.axis]))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: the magnitudes are the weight's norms, so that the effect is zero."""
        self.magnitude.copy_(self._norms(weight).flatten())

    def forward(self, x: Tensor, base: Base) -> Tensor:
        frozen = cast("WeightBase", base)
        weight, bias = self.merged(frozen.weight, frozen.bias)
        return call_weight(x, weight.to(x.dtype), bias, self.layout)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`. The bias has no part in it."""
        changed = weight + self.update.delta_weight().to(weight.dtype)
        norms = self._norms(changed)
        return changed * (self.magnitude.to(weight.dtype).view_as(norms) / norms), bias

    def _norms(self, weight: Tensor) -> Tensor:
        """Norms that keep their axes."""
        own = weight.movedim(self.axis, 0).flatten(1).norm(dim=1) + torch.finfo(weight.dtype).eps
        return own.view([-1 if axis == self.axis else 1 for axis in range(weight.ndim)])
