"""Images as a model's input, read a few at a time in processes of their own; one that cannot be read is an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.errors import DataError
from adapterkit.training.classification.preprocessing import Pixels
from adapterkit.training.data_files import Notes
from adapterkit.training.image_folder import image_files
from adapterkit.training.reading_processes import in_portions, read_batches

_AT_ONCE = 16


@dataclass(frozen=True)
class Group:
    """A few images.

    Attributes:
        paths: Their files.
        images: Those that can be read: [images, channels, height, width]; None where none can.
        errors: For each file what is wrong with it, or None.
    """

    paths: Sequence[Path]
    images: Tensor | None
    errors: Sequence[DataError | None]


@dataclass(frozen=True)
class _Read:
    paths: Sequence[Path]
    pixels: Pixels

    def __getitem__(self, number: int) -> tuple[Path, Tensor | DataError]:
        path = self.paths[number]
        try:
            return path, self.pixels.read(path)
        except DataError as error:
            return path, error


def _grouped(items: Sequence[tuple[Path, Tensor | DataError]]) -> Group:
    images = [found for _, found in items if isinstance(found, Tensor)]
    errors = [found if isinstance(found, DataError) else None for _, found in items]
    return Group([path for path, _ in items], torch.stack(images) if images else None, errors)


def read_images(paths: Sequence[Path], pixels: Pixels, workers: int) -> Generator[Group, None, None]:
    """The images of the files in their order. Never more of them are decoded than a few for each process."""
    with contextlib.closing(
        read_batches(_Read(paths, pixels), in_portions(range(len(paths)), _AT_ONCE), _grouped, workers)
    ) as groups:
        yield from groups


def files_of(inputs: Sequence[Path]) -> list[Path]:
    """The files, and the images in the folders; what else is there is told in a warning.

    Raises:
        DataError: There is no such file or folder, or none that is read.
    """
    return [path for place in inputs for path in ([place] if place.is_file() else _images_in(place))]


def _images_in(folder: Path) -> list[Path]:
    notes = Notes(folder)
    found = image_files(folder, notes)
    notes.warn()
    return found
