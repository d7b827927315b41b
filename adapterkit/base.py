"""What an adapter is given of the model: what its point computed before. Part of the contract in `adapter`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Base(Protocol):
    """What a point computed before this adapter: `base(x)`."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """The output for this input."""
        ...


class WeightBase(Base, Protocol):
    """The base at a `weight` point: its frozen weight can be read too.

    Below other adapters (in a `Stack`) it is the weight with those in it.
    """

    @property
    def weight(self) -> Tensor:
        """[out, in / groups, *kernel], in the model's dtype; the point's rows (or columns) only. Requires no grad."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[out] or None."""
        ...

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the point computes with another weight and bias of these shapes, in the model's dtype."""
        ...


class Sublayer(Base, Protocol):
    """The base at an `output` point: `x` is the residual stream, `base(x)` the sublayer's output before the add.

    The block computes `y = x + base(x)` (pre-norm), or `y = norm_out(x + base(x))` (post-norm).
    """

    def norm_in(self, x: Tensor) -> Tensor:
        """The pre-norm between residual stream and sublayer; the identity in a post-norm block."""
        ...

    def norm_out(self, x: Tensor) -> Tensor:
        """The post-norm over the residual sum; the identity in a pre-norm block."""
        ...


class Part(Protocol):
    """Another adapter at the same point."""

    def __call__(self, x: Tensor, base: Base, /) -> Tensor:
        """As `AdapterModule.forward`."""
        ...
