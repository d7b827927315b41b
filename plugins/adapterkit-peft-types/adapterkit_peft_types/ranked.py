"""What types with a rank share: the rank, a dropout of the input, and where they can act."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

import adapterkit as ak
from adapterkit.kernels import low_rank
from adapterkit.points import Kind

_MAX_RANK = 2**16


@dataclass(frozen=True)
class Ranked(ak.AdapterConfig):
    """A type of some rank at weights; subclasses say more.

    Attributes:
        rank: Of the factors.
        dropout: Probability of zeroing an element of the input in training.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    rank: int = 8
    dropout: float = 0.0

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be at least 0 and less than 1, not {self.dropout!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.cuts_groups:
            return f"{type(self).__name__} acts on whole grouped convolutions"
        if point.is_read and self.dropout:
            return "the model reads this weight, whose input dropout cannot reach: set dropout=0 here"
        return super().accepts(point)


class Thinned(ak.AdditiveModule):
    """A low-rank update of an input that training thins out; subclasses say what `product` is.

    Args:
        point: Where.
        dropout: Of the input, in training.
    """

    def __init__(self, point: ak.InjectionPoint, dropout: float) -> None:
        super().__init__()
        self.layout = point.layout
        self.dropout = nn.Dropout(dropout) if dropout and point.form != "embedding" else None

    def product(self) -> ak.Factors:
        """The update, dropout aside."""
        raise NotImplementedError

    def thinned(self, x: Tensor) -> Tensor:
        """The input with what training drops of it."""
        return x if self.dropout is None else self.dropout(x)

    def factors(self) -> ak.Factors | None:
        return None if self.training and self.dropout is not None else self.product()

    def delta(self, x: Tensor) -> Tensor:
        return low_rank.update(self.thinned(x), self.product())

    def delta_weight(self) -> Tensor:
        return low_rank.dense(self.product())
