"""Examples in rows: each by itself, several in one row with none seeing another, or all joined and cut into blocks."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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


def packed(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which examples are in which row: the longest first, each where the least room is left (best-fit decreasing).

    Args:
        lengths: Of the examples, none above the limit.
        limit: Tokens of a row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room that is left, number of the row: sorted
    for example in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = bisect.bisect_left(rooms, (lengths[example], -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = limit, len(rows)
            rows.append([])
        rows[row].append(example)
        bisect.insort(rooms, (room - lengths[example], row))
    return rows


def joined(examples: Sequence[Encoded], size: int) -> list[Encoded]:
    """All examples one behind the other, cut into blocks; what is left over at the end is not used."""
    tokens = torch.cat([one.tokens for one in examples])
    learnt = torch.cat([one.learnt for one in examples])
    blocks = (Encoded(tokens[at : at + size], learnt[at : at + size]) for at in range(0, len(tokens) - size + 1, size))
    return [block for block in blocks if block.teaches]


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
