"""How the rows that adapters were chosen for become those of the batch that a module is given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adapterkit.contract.layouts import Repeats
from adapterkit.errors import RoutingError


@dataclass(frozen=True)
class Batch:
    """What is known of the rows of a batch.

    Attributes:
        named: How many were told apart.
        run: The largest number of them that, one after the other from the first on, have always the same.
        repeats: How a module's batch gets larger; see `adapterkit.backend.Backend.repeats`.
        copies: How often the whole batch is repeated, where that was told.
        at: The point's id, for messages.
    """

    named: int
    run: int = 1
    repeats: Repeats | None = None
    copies: int | None = None
    at: str = ""

    def fit(self, tensor: Tensor) -> Fit:
        """How the named rows become those of a tensor [rows, ...].

        Raises:
            RoutingError: They cannot.
        """
        rows, named = (tensor.shape[0] if tensor.ndim else 1), self.named
        if rows == named:
            return _SAME
        if rows < named:
            each = named // rows
            if rows * each == named and self.run % each == 0:
                return Fit(step=each)
        elif self.repeats == "each" and tensor.ndim > 2 and rows % named == 0:
            return Fit(each=rows // named)
        elif self.repeats == "whole" and self.copies and rows % (named * self.copies) == 0:
            return Fit(each=rows // (named * self.copies), whole=self.copies)
        raise RoutingError(self._told(tensor, rows))

    def _told(self, tensor: Tensor, rows: int) -> str:
        where = f" at {self.at}" if self.at else ""
        told = f"{self.named} samples were routed, but{where} a tensor {tuple(tensor.shape)} has {rows} rows"
        if rows < self.named and self.named % rows == 0:
            return f"{told}, each of which stands for {self.named // rows} samples: give these the same adapter"
        if self.repeats == "whole" and rows % self.named == 0:
            return (
                f"{told}. A pipeline with guidance repeats the batch: say routed(..., copies={rows // self.named}), or "
                "copies=1 where there are several images of each sample and no guidance"
            )
        return (
            f"{told}. Name one adapter for each row that the model sees (or for each sample, where generation makes a "
            "whole number of rows from it), and route none that acts where there is no row per sample (position "
            "embeddings, windows, experts)"
        )


@dataclass(frozen=True)
class Fit:
    """Every `step`-th of the named rows, `each` times one after the other, and all of that `whole` times."""

    step: int = 1
    each: int = 1
    whole: int = 1

    def of(self, values: Tensor) -> Tensor:
        """The values [named, ...] of a batch's rows."""
        if self.step > 1:
            values = values[:: self.step]
        if self.each > 1:
            values = values.repeat_interleave(self.each, dim=0)
        return values if self.whole == 1 else values.repeat(self.whole, *(1 for _ in values.shape[1:]))

    def places(self, named: tuple[int, ...]) -> tuple[int, ...]:
        """The same of numbers."""
        return tuple(one for one in named[:: self.step] for _ in range(self.each)) * self.whole


_SAME = Fit()


def repeated(values: Tensor, tensor: Tensor, repeats: Repeats | None) -> Tensor:
    """Values [samples, ...] for the rows of a tensor, where each sample became several; else the values themselves."""
    each, rest = divmod(tensor.shape[0] if tensor.ndim > 2 else 0, len(values))
    return values.repeat_interleave(each, dim=0) if repeats == "each" and each > 1 and not rest else values


class Share:
    """How strongly something acts in each row: 1, 0, or a part of 1 in an expression.

    Args:
        values: [named], float64.
        batch: What the named rows are.
    """

    def __init__(self, values: Tensor, batch: Batch) -> None:
        self.values, self.batch = values, batch

    def rows(self, tensor: Tensor) -> Tensor:
        """Its values for the rows of a tensor, in its dtype and on its device."""
        return self.batch.fit(tensor).of(self.values).to(tensor.device, tensor.dtype)

    def scaled(self, effect: Tensor) -> Tensor:
        """An effect [rows, ...] times its rows' values."""
        rows = self.rows(effect).view(-1, *(1 for _ in effect.shape[1:]))
        return rows * effect.masked_fill(rows == 0, 0)  # what overflows in one row must not reach another: 0 * inf

    def __mul__(self, scale: float) -> Share:
        return Share(self.values * scale, self.batch)

    __rmul__ = __mul__

    def __add__(self, other: Share | float) -> Share:
        return Share(self.values + (other.values if isinstance(other, Share) else other), self.batch)

    __radd__ = __add__
