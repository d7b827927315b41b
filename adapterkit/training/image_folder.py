"""The images in a folder, without what they show."""

from __future__ import annotations

from pathlib import Path

from adapterkit.errors import DataError
from adapterkit.training.data_files import Notes, content_key, walk
from adapterkit.training.image_files import ENDINGS, image_size


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
