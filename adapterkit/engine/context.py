"""Side inputs of a block, as the adapter at one point sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from adapterkit.contract.layouts import Repeats
from adapterkit.errors import AttachError, ContextError, did_you_mean
from adapterkit.kernels.batches import repeated

Side = Callable[[Tensor], Mapping[str, Tensor]]
"""The side inputs for a point's input x."""


class Context(Mapping[str, Tensor]):
    """Side inputs by name, with the rows of one point's input.

    Args:
        given: What the block gives: [rows, ...], or [1, ...] for all rows.
        x: The point's input, whose first axis are the rows.
        at: The point's id, for messages.
        repeats: How its batch gets larger; see `adapterkit.backend.Backend.repeats`.
    """

    def __init__(self, given: Mapping[str, Tensor], x: Tensor, at: str, repeats: Repeats | None = None) -> None:
        self._given, self._x, self._at = given, x, at
        self._repeats: Repeats | None = repeats

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._given:
            raise ContextError(
                f"the adapter at {self._at} reads the side input {name!r}, which no block around this forward gives: "
                f"run it inside `with adapters.context({name}=...):`.{did_you_mean(name, self._given)}"
            )
        value, rows = self._given[name], self._x.shape[0] if self._x.ndim else 1
        value = value if value.shape[0] == 1 else repeated(value, self._x, self._repeats)
        if value.shape[0] == rows:
            return value.to(self._x.device)
        if value.shape[0] != 1:
            raise ContextError(
                f"the side input {name!r} has {value.shape[0]} rows, and the input at {self._at} has {rows}: "
                f"{tuple(self._x.shape)}. Give one row for each that the model sees (a pipeline with guidance doubles "
                "the batch), or one for all, [1, ...]; where tokens or windows are rows, only one for all fits"
            )
        return value.to(self._x.device).expand(rows, *value.shape[1:])

    def __contains__(self, name: object) -> bool:
        return name in self._given

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:  # type: ignore[override]
        return self[name] if name in self._given else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


class Beside:
    """See `adapterkit.contract.base.Beside`.

    Args:
        x: What has the rows.
        side: The side inputs.
        given: What the attention's module was called with, where that is kept.
    """

    def __init__(self, x: Tensor, side: Side, given: Callable[[], Tensor] | None = None) -> None:
        self._x, self._side, self._given = x, side, given

    @property
    def context(self) -> Mapping[str, Tensor]:
        return self._side(self._x)

    @property
    def input(self) -> Tensor:
        if self._given is None:
            raise AttachError(
                "what the attention was called with is kept for adapters that say so: reads_input = True, at a point "
                "of attention"
            )
        return self._given()


def no_side(x: Tensor) -> Mapping[str, Tensor]:
    """What a base has that no block can reach."""
    return Context({}, x, "a weight that is read")
