"""Texts that belong together: rows, tokens, batches."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapterkit.training.language.layouts import Layout, Part, text_of
from adapterkit.training.language.rows import Row
from adapterkit.training.language.shelf import Shelf
from adapterkit.training.order import Draw


@dataclass(frozen=True)
class Related:
    """Two texts that belong together, and perhaps one that does not belong to the first.

    Attributes:
        anchor, positive, negative: The texts.
        score: How alike the first two are, where that is told: from 0 to 1.
    """

    anchor: str
    positive: str
    negative: str | None = None
    score: float | None = None


def _words_of(part: Part, what: str, row: Row) -> str:
    """A text with something in it: of nothing many a model has an embedding that is no number."""
    text = text_of(part[what], what, row)
    if not text.strip():
        raise row.error(f"has nothing in its {what!r}; remove it")
    return text


def _triple(part: Part, row: Row) -> Related:
    negative = part.get("negative")
    there = negative is not None and bool(text_of(negative, "negative", row).strip())  # tables leave a cell empty
    return Related(_words_of(part, "anchor", row), _words_of(part, "positive", row), negative if there else None)


def _scored(part: Part, row: Row) -> Related:
    try:
        score = float(part["score"])
    except (TypeError, ValueError):
        score = -1.0
    if not 0 <= score <= 1:
        raise row.error(f"must have a number from 0 to 1 as 'score', not {part['score']!r:.60}")
    return Related(_words_of(part, "anchor", row), _words_of(part, "positive", row), score=score)


_FIRST = ("anchor", "query", "question", "sentence1", "text1")
_SECOND = ("positive", "passage", "document", "answer", "sentence2", "text2")
RELATED = (
    Layout(
        "pairs with scores", {"anchor": _FIRST, "positive": _SECOND, "score": ("score", "similarity_score")}, _scored
    ),
    Layout("pairs", {"anchor": _FIRST, "positive": _SECOND}, _triple, {"negative": ("negative", "hard_negative")}),
)
"""What embeddings are learnt from."""


@dataclass(frozen=True)
class Group:
    """The texts of a row as a model takes them.

    Attributes:
        texts: Anchor, positive, and the negative where there is one: the tokens of each.
        score: See `Related`.
    """

    texts: tuple[tuple[int, ...], ...]
    score: float | None


class Groups(Sequence[Group]):
    """Rows by number, read when they are asked for; nothing about one is random.

    Args:
        shelf: See `encode`.
        places: Those of the shelf that are meant; None for all.
    """

    def __init__(self, shelf: Shelf, places: np.ndarray | None = None) -> None:
        self.shelf, self.places = shelf, np.arange(len(shelf)) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, which: Any) -> Any:
        """A row by its number or by a draw, or those of a slice."""
        if isinstance(which, slice):
            return Groups(self.shelf, self.places[which])
        place = int(self.places[which.index if isinstance(which, Draw) else which])
        count, *numbers = self.shelf[place].tolist()
        lengths, tokens = numbers[:count], iter(numbers[count:])
        score = float(self.shelf.tags[place : place + 1].view(np.float64)[0])
        return Group(
            tuple(tuple(itertools.islice(tokens, length)) for length in lengths), score if score >= 0 else None
        )


def encode(found: Iterable[Related], tokenizer: Any, limit: int, shelf: Shelf) -> dict[str, Any]:
    """Puts the texts of each row as tokens, cut to the limit, on a shelf: how many, their lengths, and their tokens.

    The tag of a row has the bits of its score, of -1 where it has none.

    Returns:
        Of the texts how many were `cut`, and the `longest`; how many rows are `scored`.
    """
    cut = longest = scored = 0
    for one in found:
        texts = [one.anchor, one.positive, *([] if one.negative is None else [one.negative])]
        whole = tokenizer(texts, verbose=False)["input_ids"]
        cut += sum(len(tokens) > limit for tokens in whole)
        kept = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        scored, longest = scored + (one.score is not None), max(longest, *map(len, kept))
        row = [len(kept), *map(len, kept), *itertools.chain.from_iterable(kept)]
        shelf.append(row, int(np.float64(-1.0 if one.score is None else one.score).view(np.int64)))
    return {"cut": cut, "longest": longest, "scored": scored}


def collated(groups: Sequence[Group], pad: int) -> dict[str, Any]:
    """A batch.

    Returns:
        `input_ids` and `attention_mask` [texts, length]: all anchors, all positives, then the negatives there are;
        `same` [anchors, others], true where a text belongs to the anchor, by any row of the batch; `scores` [anchors]
        or None.
    """
    groups = list(groups)
    anchors, positives = [one.texts[0] for one in groups], [one.texts[1] for one in groups]
    others = [*positives, *(one.texts[2] for one in groups if len(one.texts) > 2)]
    belonging: dict[tuple[int, ...], set[tuple[int, ...]]] = {anchor: {anchor} for anchor in anchors}
    for anchor, positive in zip(anchors, positives, strict=True):
        belonging[anchor].add(positive)
    texts = [*anchors, *others]
    length = max(map(len, texts))
    return {
        "input_ids": torch.tensor([[*text, *[pad] * (length - len(text))] for text in texts]),
        "attention_mask": torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts]),
        "same": torch.tensor([[other in belonging[anchor] for other in others] for anchor in anchors]),
        "scores": None if groups[0].score is None else torch.tensor([one.score for one in groups]),
    }


def belonging(groups: Iterable[Group]) -> tuple[Tensor, list[Sequence[int]]]:
    """A number for what each positive says, [rows], and of every anchor the numbers that belong to it, by any row."""
    numbers: dict[bytes, int] = {}
    own: dict[int, dict[int, None]] = {}
    anchors, positives = [], []
    for one in groups:
        anchor, positive = (
            numbers.setdefault(hashlib.blake2b(repr(text).encode(), digest_size=16).digest(), len(numbers))
            for text in one.texts[:2]
        )
        anchors.append(anchor)
        positives.append(positive)
        own.setdefault(anchor, {anchor: None})[positive] = None
    lists = {anchor: list(texts) for anchor, texts in own.items()}
    return torch.tensor(positives), [lists[anchor] for anchor in anchors]
