"""Texts with classes: rows, tokens, batches."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapterkit.errors import DataError
from adapterkit.training.language.layouts import Layout, Part, text_of
from adapterkit.training.language.rows import Row
from adapterkit.training.language.shelf import Shelf
from adapterkit.training.order import Draw, derive_seed


@dataclass(frozen=True)
class Labelled:
    """A text, or two that belong together, and the class."""

    text: str
    pair: str | None
    label: str


def _text(part: Part, row: Row) -> tuple[str, str | None]:
    pair = part.get("pair")
    return text_of(part["text"], "text", row), None if pair is None else text_of(pair, "pair", row)


def _labelled(part: Part, row: Row) -> Labelled:
    label = part["label"]
    if not isinstance(label, (str, int, float, bool)) or label == "":
        raise row.error(f"must have a name or a number as 'label', not {label!r:.60}")
    return Labelled(*_text(part, row), str(label).strip())


_TEXTS = ("text", "sentence", "sentence1", "premise", "question")
_PAIRS = {"pair": ("text_pair", "sentence2", "hypothesis")}
UNLABELLED = (Layout("texts", {"text": _TEXTS}, _text, _PAIRS),)
"""What is classified: a text, or two."""
LABELLED = (
    Layout(
        "texts with classes",
        {
            "text": _TEXTS,
            "label": ("label", "labels", "class", "category", "intent"),
        },
        _labelled,
        _PAIRS,
    ),
)
"""What a classifier learns from."""


def class_names(names: Collection[str]) -> list[str]:
    """The classes, by number where all are whole numbers, else by name.

    Args:
        names: All that there are, each once.

    Raises:
        DataError: There are fewer than two.
    """
    if len(names) < 2:
        raise DataError(f"two or more classes are needed; the labels are all {', '.join(names)}")
    numbers = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else str)


@dataclass(frozen=True)
class Encoding:
    """A text as a model takes it.

    Attributes:
        inputs: The model's arguments by name, each a list with a number for every token.
        label: The number of the class.
    """

    inputs: dict[str, list[int]]
    label: int

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


def encode(
    found: Iterable[Labelled], classes: Sequence[str], tokenizer: Any, limit: int, shelf: Shelf
) -> dict[str, Any]:
    """Puts the texts as tokens, cut to the limit, on a shelf: of each all inputs, one behind the other.

    Args:
        found: Texts.
        classes: Their classes by number, which are the tags.
        tokenizer: Of the model.
        limit: Most tokens.
        shelf: Is empty.

    Returns:
        The `inputs` by name, and of the texts how many were `cut` and the `longest` of them.

    Raises:
        DataError: A label is of no class, or a text is empty and the tokenizer has no marks for that.
    """
    number = {name: place for place, name in enumerate(classes)}
    strangers: set[str] = set()
    names: list[str] = []
    cut = longest = empty = 0
    for one in found:
        if one.label not in number:
            strangers.add(one.label)
            continue
        whole = tokenizer(one.text, one.pair, verbose=False)
        if len(whole["input_ids"]) > limit:
            cut += 1
            whole = tokenizer(one.text, one.pair, truncation=True, max_length=limit)
        empty += not whole["input_ids"]
        names, longest = list(whole), max(longest, len(whole["input_ids"]))
        shelf.append([value for values in whole.values() for value in values], number[one.label])
    if strangers:
        raise DataError(f"labels that the training data does not have: {', '.join(sorted(strangers)[:5])}")
    if empty:
        raise DataError(f"rows with a text of which the tokenizer makes no token: {empty}; remove them")
    return {"inputs": names, "cut": cut, "longest": longest}


def unlabelled(text: str, pair: str | None, tokenizer: Any, limit: int) -> Encoding:
    """A text to be classified, cut to the limit."""
    found = tokenizer(text, pair, truncation=True, max_length=limit)
    return Encoding({name: list(values) for name, values in found.items()}, 0)


class Texts(Sequence[Encoding]):
    """Texts by number, read when they are asked for; nothing about one is random.

    Args:
        shelf: See `encode`.
        names: Of the inputs.
        places: Those of the shelf that are meant; None for all.
    """

    def __init__(self, shelf: Shelf, names: Sequence[str], places: np.ndarray | None = None) -> None:
        self.shelf, self.names = shelf, names
        self.places = np.arange(len(shelf)) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, which: Any) -> Any:
        """A text by its number or by a draw, or those of a slice."""
        if isinstance(which, slice):
            return Texts(self.shelf, self.names, self.places[which])
        place = int(self.places[which.index if isinstance(which, Draw) else which])
        rows = self.shelf[place].view(len(self.names), -1).tolist()
        return Encoding(dict(zip(self.names, rows, strict=True)), int(self.shelf.tags[place]))

    @property
    def labels(self) -> np.ndarray:
        """The numbers of their classes: [texts]."""
        return self.shelf.tags[self.places]


def collated(items: Sequence[Encoding], pad: int) -> dict[str, Any]:
    """`inputs` [texts, length] by name, filled up on the right with `pad` and zeros, and `labels` [texts]."""
    items = list(items)
    length = max(map(len, items))
    inputs = {
        name: torch.tensor(
            [one.inputs[name] + [pad if name == "input_ids" else 0] * (length - len(one)) for one in items]
        )
        for name in items[0].inputs
    }
    return {"inputs": inputs, "labels": torch.tensor([one.label for one in items])}


def split_classes(texts: Texts, classes: Sequence[str], share: float, seed: int) -> tuple[Texts, Texts]:
    """Of each class the same share held out, at least one text on either side; none where the share is 0.

    Raises:
        DataError: A class has one text.
    """
    labels = texts.labels
    apart = np.zeros(len(texts), bool)
    for label, name in enumerate(classes):
        mine = np.flatnonzero(labels == label)
        if share and len(mine) < 2:
            raise DataError(
                f"class {name!r} has {len(mine)} text; two are needed, one to train and one to measure. Give "
                "options.validation, or set options.validation_fraction=0"
            )
        count = min(max(round(len(mine) * share), 1), len(mine) - 1) if share else 0
        apart[heapq.nsmallest(count, map(int, mine), key=lambda number: derive_seed(seed, "held out", number))] = True
    return tuple(Texts(texts.shelf, texts.names, texts.places[which]) for which in (~apart, apart))  # type: ignore[return-value]


def scores(found: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Accuracy, and the mean over classes of F1.

    Args:
        found: The classes that the model says: [texts].
        labels: The right ones: [texts].
        classes: How many there are.
    """
    hits = torch.bincount(labels[found == labels], minlength=classes).double()
    said, right = (torch.bincount(values, minlength=classes).double() for values in (found, labels))
    f1 = 2 * hits / (said + right).clamp(min=1)
    return {"accuracy": (found == labels).double().mean().item(), "f1": f1[(said + right) > 0].mean().item()}
