"""The rows of a batch that have adapters of their own: where they are, to be taken out and put back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from adapterkit.contract.layouts import Repeats
from adapterkit.kernels.batches import Batch


class Rows:
    """Some rows of a batch, in an order.

    Args:
        places: Their numbers, each once.
        total: Rows of the batch.
    """

    def __init__(self, places: Iterable[int], total: int) -> None:
        self.places, self.total = tuple(places), total
        self._index = _normal(self.places)
        self._on: dict[torch.device, Tensor] = {}
        first = self.places[0] if self.places else 0
        self._start = first if self.places == tuple(range(first, first + len(self.places))) else None

    def __len__(self) -> int:
        return len(self.places)

    @property
    def is_whole(self) -> bool:
        """Whether they are the batch as it is."""
        return self._start == 0 and len(self.places) == self.total

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor [total, ...]: itself or a view where they follow each other."""
        if self.is_whole:
            return tensor
        if self._start is not None:
            return tensor.narrow(0, self._start, len(self.places))
        return tensor.index_select(0, self.index(tensor.device))

    def added(self, tensor: Tensor, part: Tensor) -> Tensor:
        """A tensor with something added to these rows, in the dtype that their sum has."""
        if part.dtype != tensor.dtype:
            dtype = torch.promote_types(part.dtype, tensor.dtype)
            tensor, part = tensor.to(dtype), part.to(dtype)
        return tensor + part if self.is_whole else tensor.index_add(0, self.index(tensor.device), part)

    def replaced(self, tensor: Tensor, part: Tensor) -> Tensor:
        """A tensor with other values in these rows."""
        return part if self.is_whole else tensor.index_copy(0, self.index(tensor.device), part)

    def index(self, device: torch.device) -> Tensor:
        """Their numbers on a device, [rows]; sent there once."""
        if device == self._index.device:
            return self._index
        found = self._on.get(device)
        if found is None:
            with torch.inference_mode(mode=False):
                found = self._on[device] = self._index.to(device)
        return found


def _normal(numbers: Sequence[int]) -> Tensor:
    """A tensor that a backward may keep, wherever it is first asked for."""
    with torch.inference_mode(mode=False):
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")


class Routes:
    """Which entry of a table each row of a batch has. What forwards need to know of it is found once.

    Args:
        ids: For each row a place in the table; its length means none.
        entries: The table's length.
        copies: How often the whole batch is repeated in the eyes of a module that repeats it, where that is known.

    Attributes:
        ids: The same as a tensor [rows], int64.
        rows: For each entry its rows.
        shares: For each entry a weight for each row, 1 or 0: [rows], float64.
    """

    def __init__(self, ids: Sequence[int], entries: int, copies: int | None = None) -> None:
        self.ids, self._ids, self._entries, self.copies = _normal(ids), tuple(ids), entries, copies
        self._run = math.gcd(len(self._ids), *(i for i in range(1, len(self._ids)) if ids[i] != ids[i - 1]))
        places: list[list[int]] = [[] for _ in range(entries + 1)]
        for row, entry in enumerate(ids):
            places[entry].append(row)
        self.rows = tuple(Rows(found, len(ids)) for found in places[:entries])
        with torch.inference_mode(mode=False):
            shares = torch.nn.functional.one_hot(self.ids, entries + 1).T.to(torch.float64)
            self.shares = shares[:entries].unbind(0)
        self._joined: dict[tuple[int, ...], Rows] = {}
        self._mixed: dict[tuple[int, ...], tuple[Rows, tuple[int, ...]]] = {}
        self._fitted: dict[tuple[int, ...], Routes] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, repeats: Repeats | None, at: str) -> Batch:
        """What is known of the rows at a point."""
        return Batch(len(self), self._run, repeats, self.copies, at)

    def fitted(self, tensor: Tensor, batch: Batch) -> Routes:
        """The routes of the rows of a tensor [rows, ...].

        Raises:
            RoutingError: There are none.
        """
        if len(tensor) == len(self):
            return self
        ids = batch.fit(tensor).places(self._ids)
        found = self._fitted.get(ids)
        if found is None:
            found = self._fitted[ids] = Routes(ids, self._entries)
        return found

    def kept(self, entries: Sequence[bool]) -> list[int]:
        """The ids in a table of those entries alone that are kept; none for the rows of the others."""
        places = [*itertools.accumulate((int(keep) for keep in entries), initial=0)]
        return [places[one] if one < len(entries) and entries[one] else places[-1] for one in self._ids]

    def joined(self, entries: tuple[int, ...]) -> Rows:
        """The rows of several entries, entry by entry."""
        found = self._joined.get(entries)
        if found is None:
            places = [place for entry in entries for place in self.rows[entry].places]
            found = self._joined[entries] = Rows(places, len(self))
        return found

    def mixed(self, entries: tuple[int, ...]) -> tuple[Rows, tuple[int, ...]]:
        """The rows of several entries in the batch's order, and for each its entry's place among these."""
        found = self._mixed.get(entries)
        if found is None:
            known = {entry: place for place, entry in enumerate(entries)}
            rows = [(row, known[entry]) for row, entry in enumerate(self._ids) if entry in known]
            owners = tuple(owner for _, owner in rows)
            found = self._mixed[entries] = (Rows((row for row, _ in rows), len(self)), owners)
        return found
