"""The images in a folder, without what they show."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from adapterkit.errors import DataError
from adapterkit.training.data_files import Notes, content_key, gather, walk
from adapterkit.training.image_files import ENDINGS, image_size
from adapterkit.training.reading_processes import in_portions, read_batches

_Found = TypeVar("_Found")
_AT_ONCE = 16  # images that are looked at between two answers of a process


def image_files(folder: Path, notes: Notes | None = None) -> list[Path]:
    """The images in a folder and its subfolders, sorted by path.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    notes = notes or Notes(folder)
    found = walk(folder, notes)
    for path in found:
        if path.suffix.lower() not in ENDINGS:
            notes.add("left out, not a kind of image that is read", path)
    images = [path for path in found if path.suffix.lower() in ENDINGS]
    if not images:
        raise DataError(f"data {folder} holds no image ({', '.join(sorted(ENDINGS))})")
    return images


def examine(path: Path, notes: Notes) -> str:
    """Decodes an image, so that a damaged one is found now and not at step 900, and says what it holds.

    Returns:
        Its `content_key`.

    Raises:
        DataError: It cannot be read.
    """
    image_size(path, notes)
    return content_key(path)


def examine_all(
    paths: Sequence[Path], notes: Notes, workers: int, examine: Callable[[Path, Notes], _Found] = examine
) -> list[_Found]:
    """What `examine` says of each, in that many processes.

    Raises:
        DataError: Naming all that cannot be read, with the reason of the first.
    """
    data = _Examined(paths, notes.folder, examine)
    answers = read_batches(data, in_portions(range(len(paths)), _AT_ONCE), list, workers)
    with contextlib.closing(answers):
        each = itertools.chain.from_iterable(answers)

        def answer(_: Path) -> _Found:
            found, told = next(each)
            notes.take(told)
            if isinstance(found, DataError):
                raise found
            return found

        return gather(paths, answer)


@dataclass(frozen=True)
class _Examined(Generic[_Found]):
    paths: Sequence[Path]
    folder: Path
    examine: Callable[[Path, Notes], _Found]

    def __getitem__(self, number: int) -> tuple[_Found | DataError, Notes]:
        notes = Notes(self.folder)
        try:
            return self.examine(self.paths[number], notes), notes
        except DataError as error:
            return error, notes
