"""What acts on a model: adapters, or expressions of them, with their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkit.composition import Expression, names_of
from adapterkit.kernels.gates import Gates
from adapterkit.kernels.inference_mode import ordinary_tensors
from adapterkit.kernels.rows import Routes
from adapterkit.kernels.sums import Strength
from adapterkit.points import InjectionPoint


def _scalar(weight: float) -> Tensor:
    with ordinary_tensors():  # a trace may save it for a backward
        return torch.tensor(weight, dtype=torch.float64)


class PerPoint(Mapping[str, Any]):
    """A weight for every point: id -> number, or what was computed. A point that is not in it has weight 0."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self._weights = {key: w if isinstance(w, Gates) else float(w) for key, w in weights.items() if w != 0}
        self._tensors = {key: w if isinstance(w, Gates) else _scalar(w) for key, w in self._weights.items()}

    def tensor(self, key: str) -> Any:
        """The weight at a point, a number as a tensor of no axes, or None where it is 0."""
        return self._tensors.get(key)

    def __getitem__(self, key: str) -> Any:
        return self._weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


Weight = float | Tensor | Gates | PerPoint


class Selection:
    """What acts: names or expressions with their weights, in the order they were asked for. Immutable.

    A weight of 0 does not act, and is not among `acting`. `tensors` is the same for a trace of torch.compile,
    which must not look at the numbers in `acting`: it would guard them.

    Where `computed`, weights are `Gates`, which hold a graph.

    Args:
        weights: Expression -> weight.
        asked: What the user said; by default the weights themselves.
        routes: The rows of each of the expressions, in their order, where the rows of a batch differ in what acts.

    Attributes:
        lost: The name of an adapter in it that was removed since.
        beneath: Whether it acts on weights as they were before others were merged into them.
    """

    __slots__ = (
        "__weakref__",
        "acting",
        "asked",
        "beneath",
        "computed",
        "idle",
        "lost",
        "routes",
        "tensors",
        "weights",
    )

    def __init__(
        self,
        weights: Mapping[Expression, Weight] | None = None,
        asked: Mapping[Expression, Any] | None = None,
        routes: Routes | None = None,
    ) -> None:
        self.routes = routes
        self.lost: str | None = None
        self.beneath = False
        self.weights: dict[Expression, Weight] = dict(weights or {})
        self.asked: dict[Expression, Any] = dict(self.weights if asked is None else asked)
        self.acting = tuple((e, w) for e, w in self.weights.items() if not isinstance(w, (int, float)) or w != 0)
        self.idle = not self.acting
        each = [w for one in self.weights.values() for w in (one.values() if isinstance(one, PerPoint) else [one])]
        self.computed = any(isinstance(weight, Gates) for weight in each)
        self.tensors = tuple((e, _scalar(w) if isinstance(w, (int, float)) else w) for e, w in self.acting)

    @classmethod
    def of_rows(cls, table: Sequence[Expression], ids: Sequence[int], copies: int | None = None) -> Selection:
        """An expression of its own for each row of a batch.

        Args:
            table: The expressions.
            ids: For each row its place in the table; the table's length for the base.
            copies: See `Routes`.
        """
        routes = Routes(ids, len(table), copies)
        return cls(dict(zip(table, routes.shares, strict=True)), routes=routes)

    @property
    def names(self) -> frozenset[str]:
        """Every adapter that is named."""
        # No generator: a hook asks, and Dynamo refuses any that runs beside a model that it compiles.
        return frozenset([name for expression in self.weights for name in names_of(expression)])

    def without(self, names: frozenset[str]) -> Selection:
        """The same selection, without the expressions that name one of these."""
        kept = [expression for expression in self.weights if names.isdisjoint(names_of(expression))]
        if self.routes is not None:
            ids = self.routes.kept([e in kept for e in self.weights])
            return Selection.of_rows(kept, ids, self.routes.copies)
        return Selection({e: self.weights[e] for e in kept}, {e: self.asked[e] for e in kept})

    def on_unmerged(self) -> Selection:
        """The same, where other weights are merged."""
        other = copy.copy(self)
        other.beneath, other.idle = True, False
        return other

    def equals(self, other: Selection) -> bool:
        """Whether the same acts, as strongly, for all rows of a batch."""
        return self is other or (not (self.routed or other.routed) and self.weights == other.weights)

    def __bool__(self) -> bool:
        return bool(self.weights)

    @property
    def stepped(self) -> bool:
        """Whether a weight is a function, which may depend on the step."""
        return any(callable(weight) for weight in self.asked.values())

    @property
    def routed(self) -> bool:
        """Whether the rows of a batch differ in what acts."""
        return self.computed or any(isinstance(weight, Tensor) for weight in self.weights.values())

    def __iter__(self) -> Iterator[Expression]:
        return iter(self.weights)

    def __repr__(self) -> str:
        return f"Selection({self.asked})"


def strength_at(weight: Weight, point: InjectionPoint) -> Strength:
    """What a weight is at one point."""
    if not isinstance(weight, PerPoint):
        return weight  # type: ignore[return-value]
    if torch.compiler.is_dynamo_compiling():
        found = weight.tensor(point.id)
        return 0.0 if found is None else found
    return weight.get(point.id, 0.0)
