"""Examples in rows: each by itself, several in one row with none seeing another, or all joined and cut into blocks."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from adapterkit.training.language.tokens import Encoded
from adapterkit.training.order import Draw

Packing = Literal["rows", "documents", "joined"]
IGNORED = -100
"""What transformers and torch take for a token that is not predicted."""


@dataclass(frozen=True)
class Line:
    """A row of a batch, before it is padded.

    Attributes:
        tokens: [tokens], int64.
        learnt: [tokens], boolean.
        positions: [tokens], which begin anew with each document.
    """

    tokens: Tensor
    learnt: Tensor
    positions: Tensor


class Rows(Sequence[Sequence[int]]):
    """Which examples are in which row.

    Args:
        members: The examples of all rows, one row behind the other.
        ends: Where each row ends among them.
    """

    def __init__(self, members: np.ndarray, ends: np.ndarray) -> None:
        self.members, self.ends = members, ends

    @classmethod
    def single(cls, count: int) -> Rows:
        """Each example in a row of its own."""
        numbers = np.arange(count)
        return cls(numbers, numbers + 1)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        """The examples of a row."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.members[self.ends[number - 1] if number else 0 : self.ends[number]].tolist()


class Lines:
    """Rows of examples; nothing about one is random.

    Args:
        examples: The examples.
        rows: The numbers of those that are in each row.
    """

    def __init__(self, examples: Sequence[Encoded], rows: Sequence[Sequence[int]]) -> None:
        self.examples, self.rows = examples, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> Line:
        return self.line(draw.index)

    def line(self, number: int) -> Line:
        """A row by its number."""
        return line_of([self.examples[example] for example in self.rows[number]])


def line_of(examples: Sequence[Encoded]) -> Line:
    """Examples in one row; the first token of each is not predicted, as nothing is before it."""
    firsts = [one.learnt.clone() for one in examples]
    for learnt in firsts:
        learnt[:1] = False
    return Line(
        torch.cat([one.tokens for one in examples]).long(),
        torch.cat(firsts),
        torch.cat([torch.arange(len(one)) for one in examples]),
    )


def packed(lengths: Any, limit: int) -> Rows:
    """Which examples are in which row: the longest first, each where the least room is left (best-fit decreasing).

    Args:
        lengths: Of the examples, none above the limit: [examples].
        limit: Tokens of a row.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    row_of, count = np.empty(len(lengths), np.int64), 0
    open_rows: dict[int, list[int]] = {}  # room that is left -> the rows that have it, a heap
    rooms: list[int] = []  # those of them that there are, sorted
    for place, example in enumerate(order):
        length = int(lengths[example])
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = heapq.heappop(open_rows[room])
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        else:
            room, row, count = limit, count, count + 1
        row_of[place], room = row, room - length
        if not room:
            continue
        if room not in open_rows:
            open_rows[room] = []
            bisect.insort(rooms, room)
        heapq.heappush(open_rows[room], row)
    by_row = np.argsort(row_of, kind="stable")
    return Rows(order[by_row], np.cumsum(np.bincount(row_of, minlength=count)))


def collated(lines: Sequence[Line], pad: int, *, apart: bool) -> dict[str, Tensor]:
    """A batch for a causal language model.

    Args:
        lines: The rows.
        pad: The token that fills shorter rows up.
        apart: Tell the model of the documents of a row by positions that begin anew, and no mask, as transformers
            understands it; padding then is one more document. Otherwise a row is one, and a mask tells padding.

    Returns:
        `input_ids` and `labels` [rows, length], and `position_ids` or `attention_mask` like them.
    """
    length = max(len(line.tokens) for line in lines)
    fill = [length - len(line.tokens) for line in lines]
    tokens = torch.stack([_filled(line.tokens, pad, more) for line, more in zip(lines, fill, strict=True)])
    learnt = torch.stack([_filled(line.learnt, 0, more) for line, more in zip(lines, fill, strict=True)])
    batch = {"input_ids": tokens, "labels": torch.where(learnt, tokens, IGNORED)}
    if apart:
        positions = [torch.cat([line.positions, torch.arange(more)]) for line, more in zip(lines, fill, strict=True)]
        return {**batch, "position_ids": torch.stack(positions)}
    there = [torch.arange(length) < len(line.tokens) for line in lines]
    return {**batch, "attention_mask": torch.stack(there).long()}


def _filled(values: Tensor, value: int, more: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, more), value=value)
