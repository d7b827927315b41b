"""The rows of a source as tokens on disk, examples as stretches of them, and what is told of both."""

from __future__ import annotations

import functools
import heapq
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from adapterkit.errors import DataError
from adapterkit.training.language.conversations import Rendered
from adapterkit.training.language.lengths import Fitting
from adapterkit.training.language.shelf import Shelf
from adapterkit.training.language.tokens import Encoded, Encoder, end_marks
from adapterkit.training.order import derive_seed


@dataclass
class Counts:
    """What is told of a source.

    Attributes:
        examples, tokens: How many.
        learnt: Tokens that are learnt.
        longest: Tokens of the longest example.
        endless: Answers without a token at which generation ends.
        shared: See `Encoder.shared`.
    """

    examples: int = 0
    tokens: int = 0
    learnt: int = 0
    longest: int = 0
    endless: int = 0
    shared: int = 0

    def add(self, one: Encoded, ends: frozenset[int]) -> None:
        """Counts an example, or a part of one."""
        self.tokens += len(one)
        self.learnt += int(one.learnt.sum())
        self.endless += not one.whole and ends.isdisjoint(one.tokens[one.learnt].tolist())

    def end(self, length: int) -> None:
        """Counts that an example of that many tokens is complete."""
        self.examples += 1
        self.longest = max(self.longest, length)


class Tokens:
    """The examples of a source.

    Args:
        shelf: Holds of every token its number, and as the lowest bit whether it is learnt; the tag of an example has
            the number of its row, and as the lowest bit a mark.
        counts: Of it.
    """

    def __init__(self, shelf: Shelf, counts: Counts) -> None:
        self.shelf, self.counts = shelf, counts

    def __len__(self) -> int:
        return len(self.shelf)

    @property
    def rows(self) -> np.ndarray:
        """Of every example the number of its row."""
        return self.shelf.tags >> 1

    @property
    def marks(self) -> np.ndarray:
        """Of every example whether it is marked."""
        return (self.shelf.tags & 1).astype(bool)

    def between(self, start: int, end: int) -> Encoded:
        """A stretch of all tokens."""
        numbers = self.shelf.between(start, end)
        return Encoded(numbers >> 1, (numbers & 1).bool())

    def example(self, place: int) -> Encoded:
        """An example by its number."""
        return self.between(*self.shelf.span(place))


class Stretches(Sequence[Encoded]):
    """Examples that are read when they are asked for.

    Args:
        tokens: Where from.
        spans: Where each begins and ends: [examples, 2].
    """

    def __init__(self, tokens: Tokens, spans: np.ndarray) -> None:
        self.tokens, self.spans = tokens, spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, place: Any) -> Any:
        """One example, or those of a slice."""
        if isinstance(place, slice):
            return Stretches(self.tokens, self.spans[place])
        start, end = self.spans[place].tolist()
        return self.tokens.between(start, end)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return self.spans[:, 1] - self.spans[:, 0]


def put(texts: Iterable[tuple[int, Rendered, bool]], encoder: Encoder, shelf: Shelf) -> dict[str, Any]:
    """Fills a shelf with examples, and returns their `Counts`.

    Args:
        texts: Of every example, or part of one, the number of its row, its text, and its mark.
        encoder: Makes tokens.
        shelf: Is empty.
    """
    ends, shared, counts = frozenset(end_marks(encoder.tokenizer)), encoder.shared, Counts()
    waiting: deque[tuple[int | None, Rendered]] = deque()

    def told() -> Iterator[Rendered]:
        for row, text, mark in texts:
            waiting.append((None if text.after else row << 1 | mark, text))
            yield text

    length = 0
    for one in encoder(told()):
        tag, text = waiting.popleft()
        length = len(one) + (length if text.before else 0)
        counts.add(one, ends)
        shelf.append((one.tokens << 1 | one.learnt).numpy(), tag)
        if tag is not None:
            counts.end(length)
    counts.shared = encoder.shared - shared
    return asdict(counts)


def fitted(tokens: Tokens, kept: np.ndarray | None, fitting: Fitting) -> Stretches:
    """The examples that fit, or what is left of them.

    Args:
        tokens: All examples; those that are marked are documents.
        kept: Of every row whether it is wanted; None for all.
        fitting: Makes them fit.
    """
    found, rows, marks = array("q"), tokens.rows, tokens.marks
    for place in range(len(tokens)):
        if kept is None or kept[rows[place]]:
            begin, last = tokens.shelf.span(place)
            part = functools.partial(_part, tokens, begin)
            for start, end in fitting(last - begin, part, whole=bool(marks[place])):
                found.extend((begin + start, begin + end))
    return Stretches(tokens, as_table(found, 2))


def _part(tokens: Tokens, begin: int, start: int, end: int) -> Encoded:
    return tokens.between(begin + start, begin + end)


def blocks(tokens: Tokens, size: int) -> Stretches:
    """All examples one behind the other, cut into blocks; what is left over at the end is not used."""
    found = array("q")
    for start in range(0, tokens.shelf.total - size + 1, size):
        if tokens.between(start, start + size).teaches:
            found.extend((start, start + size))
    return Stretches(tokens, as_table(found, 2))


def as_table(values: array[int], columns: int) -> np.ndarray:
    """The same numbers in rows, where they lie: int64, [rows, columns]."""
    return np.frombuffer(values, np.int64).reshape(-1, columns) if values else np.empty((0, columns), np.int64)


def held_out(rows: int, share: float, seed: int) -> np.ndarray:
    """Of every row whether it is held out: at least one is, and one is not; none where the share is 0.

    Raises:
        DataError: There is one row.
    """
    chosen = np.zeros(rows, bool)
    if not share:
        return chosen
    if rows < 2:
        raise DataError("there is one row; two are needed, one to train and one to measure. Give options.validation")
    count = min(max(round(rows * share), 1), rows - 1)
    chosen[heapq.nsmallest(count, range(rows), key=lambda number: derive_seed(seed, "held out", number))] = True
    return chosen
