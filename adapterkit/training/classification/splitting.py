"""What of the images is held out: of each class the same share, and by what they hold, whatever they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from adapterkit.errors import DataError
from adapterkit.training.classification.examples import Example
from adapterkit.training.order import derive_seed

Split = tuple[list[Example], list[Example]]


def hold_out(examples: Sequence[Example], share: float, seed: int, keys: Mapping[Path, str], *, several: bool) -> Split:
    """What is trained on, and what is held out.

    Args:
        examples: All of them.
        share: Of the images.
        seed: The run's.
        keys: What each file holds.
        several: Whether an image may be of several classes.

    Raises:
        DataError: A class has one image.
    """
    if not share:
        return [*examples], []

    def drawn(one: Example) -> tuple[int, Path]:
        return derive_seed(seed, "held out", keys[one.path]), one.path

    chosen = _of_sets(examples, share, drawn) if several else _of_classes(examples, share, drawn)
    return [one for one in examples if one.path not in chosen], [one for one in examples if one.path in chosen]


def _of_classes(examples: Sequence[Example], share: float, drawn: Callable[[Example], object]) -> set[Path]:
    """Of each class the same share, at least one image on either side."""
    classes: dict[str, list[Example]] = {}
    for one in examples:
        classes.setdefault(one.names[0], []).append(one)
    chosen: set[Path] = set()
    for name, members in classes.items():
        if len(members) < 2:
            raise DataError(
                f"class {name!r} has one image; two are needed, one to train and one to measure (or "
                "options.validation, or options.validation_fraction=0)",
                [one.path for one in members],
            )
        count = min(max(round(len(members) * share), 1), len(members) - 1)
        chosen.update(one.path for one in sorted(members, key=drawn)[:count])  # type: ignore[type-var]
    return chosen


def _of_sets(examples: Sequence[Example], share: float, drawn: Callable[[Example], object]) -> set[Path]:
    """A share of all, but never the last image of a class."""
    left = Counter(name for one in examples for name in one.names)
    wanted = min(max(round(len(examples) * share), 1), len(examples) - 1)
    chosen: set[Path] = set()
    for one in sorted(examples, key=drawn):  # type: ignore[type-var]
        if len(chosen) < wanted and all(left[name] > 1 for name in one.names):
            chosen.add(one.path)
            left.subtract(one.names)
    return chosen
