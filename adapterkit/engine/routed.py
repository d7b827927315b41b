"""A batch whose rows have adapters of their own: each computes its own rows, and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from adapterkit.contract.abilities import Abilities
from adapterkit.contract.base import Base
from adapterkit.contract.factors import Factors
from adapterkit.engine.expressions import Several
from adapterkit.errors import RoutingError
from adapterkit.kernels import low_rank
from adapterkit.kernels.batches import Batch, Share
from adapterkit.kernels.packed_documents import Documents
from adapterkit.kernels.rows import Routes, Rows
from adapterkit.kernels.sums import Acting, Active, effect, effects, is_added


class Routed(Several):
    """What acts at one point under routes.

    Args:
        parts: Place in the table of the routes -> what acts here for it.
        routes: The rows.
        batch: What is known of them here; by default that they are the batch's.
    """

    abilities: Abilities = Abilities(several=True)

    def __init__(self, parts: Mapping[int, Acting], routes: Routes, batch: Batch | None = None) -> None:
        self.parts = [*parts.values()]
        self._placed, self._routes, self._batch = parts, routes, batch or routes.batch(None, "")

    @property
    def inner(self) -> Active:
        """The parts with a weight for each row, 1 or 0, for whatever computes with all rows."""
        shares = self._routes.shares
        return [(acting, Share(shares[place], self._batch)) for place, acting in self._placed.items()]

    def __call__(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return self._onto(y, x, y, base)

    def effect(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """What they add to `y`, which is `base(x)`."""
        return self._onto(torch.zeros_like(y), x, y, base)

    def _onto(self, total: Tensor, x: Tensor, y: Tensor, base: Base) -> Tensor:
        routes = self._routes.fitted(y, self._batch)
        if not isinstance(x, Tensor) or not x.ndim or len(x) != len(y):
            return total + effects(x, y, base, self.inner)
        left = self._placed
        if factors := self._mixable(x, y, routes):
            rows, owners = routes.mixed(tuple(factors))
            added = low_rank.mixed(rows.of(x), [*factors.values()], owners)
            total = rows.added(total, added.to(y.dtype))
            left = {place: one for place, one in left.items() if place not in factors}
        if left:
            parts = [self._part(x, y, base, routes.rows[place], one) for place, one in left.items()]
            total = routes.joined(tuple(left)).added(total, torch.cat(parts))
        return total

    def _mixable(self, x: Tensor, y: Tensor, routes: Routes) -> dict[int, Factors]:
        """Place in the table -> factors, of those adapters whose rows are best computed all at once."""
        found: dict[int, Factors] = {}
        for place, one in self._placed.items():
            if one.abilities.low_rank and is_added(one):
                factors = one.factors()  # type: ignore[attr-defined]
                if factors is not None and factors.B.shape[0] == y.shape[-1]:
                    found[place] = factors
        if len(found) < 2:
            return {}
        _, owners = routes.mixed(tuple(found))
        return found if low_rank.is_mixable(x, [*found.values()], len(owners)) else {}

    @staticmethod
    def _part(x: Tensor, y: Tensor, base: Base, rows: Rows, adapter: Acting) -> Tensor:
        """What one adapter adds to its rows."""
        own = rows.of(x)
        if is_added(adapter):  # the base's output is asked for its shape alone
            return effect(adapter, own, y.narrow(0, 0, len(rows)), base)
        outputs = rows.of(y)
        return effect(adapter, own, outputs, RowsBase(base, x, rows, own, outputs))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """There is no such weight."""
        raise RoutingError("samples cannot be routed where one weight serves the whole batch")


class RowsBase:
    """The base of some rows of a batch.

    Args:
        base: That of the whole batch.
        x: The whole batch.
        rows: Which.
        own, outputs: These rows of `x` and of `base(x)`.
    """

    def __init__(self, base: Base, x: Tensor, rows: Rows, own: Tensor, outputs: Tensor) -> None:
        self._base, self._x, self._rows, self._own, self._outputs = base, x, rows, own, outputs
        self._by_rows: bool = getattr(base, "by_rows", False)

    def __call__(self, x: Tensor, /) -> Tensor:
        if x is self._own:
            return self._outputs
        return self._base(x) if self._by_rows else self._rows.of(self._base(self._rows.replaced(self._x, x)))

    @property
    def context(self) -> Mapping[str, Tensor]:
        return SomeRows(self._base.context, self._rows)

    @property
    def weight(self) -> Tensor:
        return self._base.weight  # type: ignore[attr-defined]

    @property
    def bias(self) -> Tensor | None:
        return self._base.bias  # type: ignore[attr-defined]

    @property
    def documents(self) -> Documents | None:
        whole = self._base.documents  # type: ignore[attr-defined]
        return None if whole is None else Documents(self._rows.of(whole.number.expand(self._rows.total, -1)))

    @property
    def layer(self) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        layer = self._base.layer  # type: ignore[attr-defined]  # an AttributeError where there is no weight
        if self._by_rows:
            return layer
        return lambda x, weight, bias: self._rows.of(layer(self._rows.replaced(self._x, x), weight, bias))

    def norm_in(self, x: Tensor) -> Tensor:
        return self._base.norm_in(x)  # type: ignore[attr-defined]

    def norm_out(self, x: Tensor) -> Tensor:
        return self._base.norm_out(x)  # type: ignore[attr-defined]


class SomeRows(Mapping[str, Tensor]):
    """Side inputs for some rows of a batch; what is not there is the same error as for the whole."""

    def __init__(self, whole: Mapping[str, Tensor], rows: Rows) -> None:
        self._whole, self._rows = whole, rows

    def __getitem__(self, name: str) -> Tensor:
        return self._rows.of(self._whole[name])

    def __contains__(self, name: object) -> bool:
        return name in self._whole

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:  # type: ignore[override]
        return self[name] if name in self._whole else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)
