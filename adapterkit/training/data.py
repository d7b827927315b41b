"""Reading training data from folders, with every file at fault named at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from adapterkit.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
CAPTIONS = (".txt", ".caption")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Captioned:
    """An image file and what it shows."""

    path: Path
    caption: str


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, sorted by path.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"data {folder} is not a folder (looked in {Path.cwd()})")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if not found:
        raise DataError(f"data {folder} holds no image ({', '.join(sorted(IMAGES))})")
    return found


def captioned_images(folder: Path, fallback: str | None) -> list[Captioned]:
    """The images of a folder, each with the text file of the same name, or else the fallback.

    Raises:
        DataError: Images lack a caption and there is no fallback, or a caption is not UTF-8 text.
    """
    files = image_files(folder)
    captions = [_caption(path) for path in files]
    lacking = [path for path, caption in zip(files, captions, strict=True) if caption is None]
    if lacking and fallback is None:
        raise DataError(
            f"{len(lacking)} of {len(files)} images in {folder} lack a caption; write NAME.txt beside each, "
            "or set options.caption for all that have none",
            lacking,
        )
    return [
        Captioned(path, fallback or "" if caption is None else caption)
        for path, caption in zip(files, captions, strict=True)
    ]


def _caption(image: Path) -> str | None:
    for suffix in CAPTIONS:
        path = image.with_suffix(suffix)
        if path.is_file():
            try:
                return " ".join(path.read_text(encoding="utf-8").split())
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"caption cannot be read ({error})", [path]) from error
    return None


def open_image(path: Path, mode: str = "RGB") -> Image.Image:
    """An upright image; transparent parts become white.

    Raises:
        DataError: The file is no image that Pillow reads.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be read as an image ({error})", [path]) from error


def cover(image: Image.Image, width: int, height: int) -> Tensor:
    """Resizes until both sides cover the target, and cuts out the centre.

    Returns:
        [channels, height, width], values 0 to 1.
    """
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return data.view(height, width, -1).permute(2, 0, 1).float() / 255.0


def gather(paths: Iterable[Path], read: Callable[[Path], _Result]) -> list[_Result]:
    """What `read` makes of every file.

    Raises:
        DataError: Naming all files that it refuses, with the reason of the first.
    """
    results, failures = [], []
    for path in paths:
        try:
            results.append(read(path))
        except DataError as error:
            failures.append((path, error))
    if failures:
        reason = str(failures[0][1]).partition(":\n")[0]
        raise DataError(f"{len(failures)} files: {reason}", [path for path, _ in failures])
    return results
