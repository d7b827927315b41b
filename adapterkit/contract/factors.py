"""A low-rank update, said once for all that can use it. Part of the contract in `adapter`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.points import WeightLayout

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Factors:
    """A weight's update as a product of two thin factors: `delta_weight = scale * B A`, `delta(x) = scale * B(A(x))`.

    A is used as the module uses its weight (a convolution with the module's stride and padding, a look-up), and B mixes
    the features of what that gives. In a grouped convolution every group has all of A, and its own rows of B.

    Attributes:
        A: [rank, in / groups, *kernel].
        B: [out, rank].
        layout: The point's.
        scale: Factor on the product. What scales single ranks or rows belongs into A or B.
    """

    A: Tensor
    B: Tensor
    layout: WeightLayout
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the update: [out, in / groups, *kernel]."""
        return (self.B.shape[0], *self.A.shape[1:])
