"""Reading training data from folders of images, with every file at fault named at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import DataError
from adapterkit.training.data_files import Notes, content_key, gather, listed, walk
from adapterkit.training.image_files import ENDINGS, cover, open_image
from adapterkit.training.text_files import read_text

__all__ = ["Captioned", "captioned_images", "cover", "examine", "image_files", "open_image"]

CAPTIONS = (".txt", ".caption")


@dataclass(frozen=True)
class Captioned:
    """An image file, what it shows, and the file that says so."""

    path: Path
    caption: str
    source: Path | None = None


def image_files(folder: Path, notes: Notes | None = None) -> list[Path]:
    """The images in a folder and its subfolders, sorted by path.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    notes = notes or Notes(folder)
    return _images_among(walk(folder, notes), folder, notes)


def captioned_images(folder: Path, fallback: str | None, notes: Notes | None = None) -> list[Captioned]:
    """The images of a folder, each with the text file of the same name, or else the fallback.

    Raises:
        DataError: Images lack a caption and there is no fallback, or a caption is no text.
    """
    notes = notes or Notes(folder)
    found = walk(folder, notes)
    files = _images_among([path for path in found if path.suffix.lower() not in CAPTIONS], folder, notes)
    texts = _texts_of(files, found, notes)
    lacking = [path for path in files if _unended(path) not in texts]
    if lacking and fallback is None:
        raise DataError(
            f"{len(lacking)} of {len(files)} images in {folder} lack a caption; write NAME.txt beside each, "
            f"or set options.caption for all that have none{_alone(found, files)}",
            lacking,
        )
    captions = dict(zip(texts, gather(texts.values(), _caption), strict=True))
    for stem, caption in captions.items():
        if not caption:
            notes.add("empty caption", texts[stem])
    return [Captioned(path, captions.get(_unended(path), fallback or ""), texts.get(_unended(path))) for path in files]


def _texts_of(images: Sequence[Path], found: Sequence[Path], notes: Notes) -> dict[Path, Path]:
    """The captions' files by what they share with their images."""
    stems = {_unended(path) for path in images}
    texts: dict[Path, Path] = {}
    for suffix in CAPTIONS:
        for path in (path for path in found if path.suffix.lower() == suffix):
            if _unended(path) not in stems:
                notes.add("left out, a caption without an image", path)
            elif texts.setdefault(_unended(path), path) != path:
                notes.add("left out, a second caption of the same image", path)
    return texts


def _alone(found: Sequence[Path], images: Sequence[Path]) -> str:
    """Captions that may have been meant for an image of another name."""
    stems = {_unended(path) for path in images}
    names = [path.name for path in found if path.suffix.lower() in CAPTIONS and _unended(path) not in stems]
    return f". Captions without an image: {listed(names)}. Without a caption" if names else ""


def examine(path: Path, notes: Notes) -> str:
    """Decodes an image, so that a damaged one is found now and not at step 900, and says what it holds.

    Returns:
        Its `content_key`.

    Raises:
        DataError: It cannot be read.
    """
    open_image(path, notes=notes)
    return content_key(path)


def _images_among(files: Sequence[Path], folder: Path, notes: Notes) -> list[Path]:
    images = [path for path in files if path.suffix.lower() in ENDINGS]
    for path in files:
        if path.suffix.lower() not in ENDINGS:
            notes.add("left out, not a kind of image that is read", path)
    if not images:
        raise DataError(f"data {folder} holds no image ({', '.join(sorted(ENDINGS))})")
    return images


def _unended(path: Path) -> Path:
    """What an image and its caption share."""
    return path.with_suffix("")


def _caption(path: Path) -> str:
    return " ".join(read_text(path).split())
