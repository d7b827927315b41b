"""Texts with classes: rows, tokens, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.errors import DataError
from adapterkit.training.language.layouts import Layout, Part, text_of
from adapterkit.training.language.rows import Row
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


def class_names(found: Sequence[Labelled]) -> list[str]:
    """The classes, by number where all are whole numbers, else by name.

    Raises:
        DataError: There are fewer than two.
    """
    names = {one.label for one in found}
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


def encode(found: Sequence[Labelled], classes: Sequence[str], tokenizer: Any, limit: int) -> tuple[list[Encoding], int]:
    """The texts as tokens, cut to the limit, and how many were longer.

    Args:
        found: Texts.
        classes: Their classes by number.
        tokenizer: Of the model.
        limit: Most tokens.

    Raises:
        DataError: A label is of no class.
    """
    number = {name: place for place, name in enumerate(classes)}
    if strangers := sorted({one.label for one in found} - set(number)):
        raise DataError(f"labels that the training data does not have: {', '.join(strangers[:5])}")
    encoded, cut = [], 0
    for one in found:
        whole = tokenizer(one.text, one.pair, verbose=False)
        if len(whole["input_ids"]) > limit:
            cut += 1
            whole = tokenizer(one.text, one.pair, truncation=True, max_length=limit)
        encoded.append(Encoding({name: list(values) for name, values in whole.items()}, number[one.label]))
    return encoded, cut


def unlabelled(text: str, pair: str | None, tokenizer: Any, limit: int) -> Encoding:
    """A text to be classified, cut to the limit."""
    found = tokenizer(text, pair, truncation=True, max_length=limit)
    return Encoding({name: list(values) for name, values in found.items()}, 0)


class Texts:
    """Texts by number; nothing about one is random."""

    def __init__(self, encoded: Sequence[Encoding]) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, draw: Draw) -> Encoding:
        return self.encoded[draw.index]


def collated(items: Sequence[Encoding], pad: int) -> dict[str, Any]:
    """`inputs` [texts, length] by name, filled up on the right with `pad` and zeros, and `labels` [texts]."""
    length = max(map(len, items))
    inputs = {
        name: torch.tensor(
            [one.inputs[name] + [pad if name == "input_ids" else 0] * (length - len(one)) for one in items]
        )
        for name in items[0].inputs
    }
    return {"inputs": inputs, "labels": torch.tensor([one.label for one in items])}


def split_classes(
    encoded: Sequence[Encoding], classes: Sequence[str], share: float, seed: int
) -> tuple[list[Encoding], list[Encoding]]:
    """Of each class the same share held out, at least one text on either side; none where the share is 0.

    Raises:
        DataError: A class has one text.
    """
    held_out: set[int] = set()
    for label, name in enumerate(classes):
        mine = [number for number, one in enumerate(encoded) if one.label == label]
        if share and len(mine) < 2:
            raise DataError(
                f"class {name!r} has {len(mine)} text; two are needed, one to train and one to measure. Give "
                "options.validation, or set options.validation_fraction=0"
            )
        count = min(max(round(len(mine) * share), 1), len(mine) - 1) if share else 0
        held_out.update(sorted(mine, key=lambda number: derive_seed(seed, "held out", number))[:count])
    return (
        [one for number, one in enumerate(encoded) if number not in held_out],
        [one for number, one in enumerate(encoded) if number in held_out],
    )


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
