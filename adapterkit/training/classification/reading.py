"""Images that are read a few at a time; one that cannot be read does not end it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from adapterkit.errors import DataError
from adapterkit.training.classification.preprocessing import Pixels
from adapterkit.training.image_folder import image_files

Read = tuple[Path, "Tensor | None", str]
"""A file, what it is for the model, or why there is nothing."""


def batched(inputs: Sequence[Path], pixels: Pixels, count: int) -> Iterator[list[Read]]:
    """The images of files and folders, `count` at a time.

    Raises:
        DataError: There is no such file or folder, or none that is read.
    """
    paths = [path for place in inputs for path in ([place] if place.is_file() else image_files(place))]
    for start in range(0, len(paths), count):
        yield [_read(path, pixels) for path in paths[start : start + count]]


def _read(path: Path, pixels: Pixels) -> Read:
    try:
        return path, pixels.read(path), ""
    except DataError as error:
        return path, None, str(error).partition(":\n")[0]
