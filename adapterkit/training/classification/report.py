"""What is told of the data before training, and of the classes after it."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from adapterkit.training.classification.confusion import draw
from adapterkit.training.classification.examples import Found
from adapterkit.training.classification.figures import ClassFigures, by_class, confusion
from adapterkit.training.run_folder import write_text

_MOST = 40  # classes that are told one by one, or drawn with their names


def repeated(found: Found, keys: Mapping[Path, str]) -> list[Path]:
    """Images that are measured with although the same is trained on, by what they hold."""
    trained = {keys[one.path] for one in found.training}
    return [one.path for one in (*(found.validation or ()), *found.test) if keys[one.path] in trained]


def facts_of(found: Found, classes: Sequence[str]) -> dict[str, str]:
    """What there is, for `--dry-run`: images, what they are for, and those of each class."""
    counts = Counter(name for one in found.all for name in one.names)
    parts = {"to train on": found.training, "to measure with": found.validation or (), "to test with": found.test}
    several = sum(len(one.names) != 1 for one in found.all)
    told = {
        "images": str(len(found.all)),
        "parts": ", ".join(f"{len(members)} {purpose}" for purpose, members in parts.items() if members),
        "classes": ", ".join(f"{name} {counts[name]}" for name in classes),
    }
    return told | ({"of several classes, or none": f"{several} images"} if several else {})


def write_report(
    folder: Path, logits: Tensor, targets: Tensor, classes: Sequence[str], *, several: bool
) -> dict[str, Any]:
    """Writes `by_class.csv`, and where an image is of one class `confusion.png`; what is told of them.

    Args:
        folder: The run folder.
        logits, targets: [images, classes].
        classes: Their names.
        several: Whether an image may be of several classes.
    """
    found = by_class(logits, targets, classes, several=several)
    table = folder / "by_class.csv"
    write_text(table, _table(found))
    told: dict[str, Any] = {"by class": str(table)}
    if len(found) <= _MOST:
        told["found of each class"] = [f"{one.name} {one.recall:.0%}" for one in found if one.images]
    if not several and len(found) <= _MOST:
        picture = folder / "confusion.png"
        drawn = draw(confusion(logits, targets), classes, picture)
        told["confusion"] = str(picture) if drawn else "not drawn, for matplotlib is not installed (adapterkit[train])"
    return told


def _table(found: Sequence[ClassFigures]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(ClassFigures))
    for one in found:
        writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in astuple(one))
    return text.getvalue()
