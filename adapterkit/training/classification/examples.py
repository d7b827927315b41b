"""A picture with its classes, and what there is of them to train on and to measure with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import DataError
from adapterkit.training.data_files import listed


@dataclass(frozen=True)
class Example:
    """A picture.

    Attributes:
        path: Its file.
        names: Its classes: one, or any number where a picture may be of several.
        part: `training`, `validation` or `test`, where a table says it.
    """

    path: Path
    names: tuple[str, ...]
    part: str = ""


@dataclass(frozen=True)
class Found:
    """What there is.

    Attributes:
        training: What is trained on.
        validation: What is measured with; None where a share of the others is to be held out.
        test: What is measured with once, at the end.
        tables: The files that say which picture is of which class.
        empty: Folders of classes that are to be trained on and hold no picture.
    """

    training: Sequence[Example]
    validation: Sequence[Example] | None = None
    test: Sequence[Example] = ()
    tables: Sequence[Path] = ()
    empty: Sequence[Path] = ()

    @property
    def all(self) -> list[Example]:
        """Every example."""
        return [*self.training, *(self.validation or ()), *self.test]


def class_names(found: Found) -> list[str]:
    """The classes that are trained on: by number where all are whole numbers, else by name.

    Raises:
        DataError: There are fewer than two, or others are measured with.
    """
    names = {name for example in found.training for name in example.names}
    if len(names) < 2:
        raise DataError(f"two or more classes are needed; there is {', '.join(names) or 'none'}")
    if strange := [one for one in found.all if not names.issuperset(one.names)]:
        told = listed(sorted({name for one in strange for name in one.names} - names))
        raise DataError(f"classes that are measured with and not trained on: {told}", [one.path for one in strange])
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else str)
