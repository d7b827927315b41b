"""Reading one picture: whatever its file says of its samples, an upright image of 8 bits, or an error that names it."""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from adapterkit.errors import DataError
from adapterkit.training.data_files import Notes
from adapterkit.training.sizes import Size

if TYPE_CHECKING:
    from PIL import Image
    from PIL.Image import Transpose

ENDINGS = frozenset(
    {
        ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx",
        ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
    }
)  # fmt: skip
# What a file of such an ending may turn out to be. Others run programs (EPS) or hold no pixels.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
_ORIENTATION = 0x0112
_DEEP = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError,
    Warning, struct.error,
)  # fmt: skip
"""What Pillow raises about metadata that are none."""
_Read = TypeVar("_Read")
_RANGES = (1.0, 255.0, 65535.0)


def open_image(path: Path, mode: str = "RGB", notes: Notes | None = None) -> Image.Image:
    """An upright image of 8 bits; transparent parts become white.

    Args:
        path: The file.
        mode: Pillow's name for the channels.
        notes: Takes up what was done to the picture.

    Raises:
        DataError: The file is no image that Pillow reads.
    """
    return _noting(path, notes, lambda told: _read(path, mode, told))


def open_alpha(path: Path) -> Image.Image | None:
    """How opaque every pixel of an upright image is, in 8 bits; None where its file does not say.

    Raises:
        DataError: The file is no image that Pillow reads.
    """
    return _noting(path, None, lambda told: _alpha(path, told))


def image_size(path: Path, notes: Notes) -> Size:
    """Height and width of an image, upright; all of it is decoded, of JPEG every eighth pixel, which is faster.

    Raises:
        DataError: The file is no image that Pillow reads.
    """
    return _noting(path, notes, lambda told: _size(path, told))


def _noting(path: Path, notes: Notes | None, read: Callable[[Notes], _Read]) -> _Read:
    """What `read` returns; what it warns of is noted, and what it raises says which file."""
    from PIL import UnidentifiedImageError

    try:
        if notes is None:
            return read(Notes(path.parent))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read(notes)
        for warning in caught:
            notes.add(f"read with a warning ({str(warning.message).partition('. ')[0]})", path)
        return found
    except DataError:
        raise
    except Exception as error:  # a damaged file makes decoders raise anything
        unknown = isinstance(error, UnidentifiedImageError)  # whose text is about the stream
        reason = "of no format that is read" if unknown else f"{type(error).__name__}: {error}"
        raise DataError(f"cannot be read as an image ({reason})", [path]) from error


def _read(path: Path, mode: str, notes: Notes) -> Image.Image:
    from PIL import Image

    with _opened(path, notes) as image:
        if image.mode in _DEEP:
            return _eight_bits(image, path, notes).convert(mode)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getextrema()[3][0] < 255:  # type: ignore[index]
                notes.add("transparent parts, which become white", path)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(mode)


def _alpha(path: Path, notes: Notes) -> Image.Image | None:
    with _opened(path, notes) as image:
        deep = image.mode in _DEEP
        return None if deep or not image.has_transparency_data else image.convert("RGBA").getchannel("A")


def _size(path: Path, notes: Notes) -> Size:
    with _file(path, notes) as file:
        if file.format == "JPEG":
            width, height = file.size
            file.draft(file.mode, (1, 1))
            file.load()
            turn = _turn(file, path, notes)
            return (width, height) if turn in _transposing() else (height, width)
    image = _read(path, "RGB", notes)
    return image.height, image.width


@contextlib.contextmanager
def _opened(path: Path, notes: Notes) -> Iterator[Image.Image]:
    """The first frame, upright, in the mode that its file has."""
    with _file(path, notes) as file:
        file.load()
        turn = _turn(file, path, notes)
        yield file if turn is None else file.transpose(turn)


@contextlib.contextmanager
def _file(path: Path, notes: Notes) -> Iterator[Image.Image]:
    from PIL import Image

    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    # Given a name, Pillow 13 maps uncompressed TIFF, and exchanges the sides of those that lie on one.
    with path.open("rb") as stream, Image.open(stream, formats=formats) as file:
        if file.format != "MPO" and getattr(file, "is_animated", False):
            notes.add("several frames, of which the first is used", path)
        yield file


def _transposing() -> frozenset[Transpose]:
    """The turns that exchange height and width."""
    from PIL.Image import Transpose

    return frozenset({Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90})


def _turn(image: Image.Image, path: Path, notes: Notes) -> Transpose | None:
    """What makes it upright, as its metadata say; None where it is, or they are damaged."""
    from PIL.Image import Transpose

    turns = (
        Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
        Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
    )  # fmt: skip
    try:
        return dict(enumerate(turns, 2)).get(image.getexif().get(_ORIENTATION, 1))
    except _DAMAGE:  # the pixels are not concerned
        notes.add("damaged EXIF data, taken as it is stored", path)
        return None


def _eight_bits(image: Image.Image, path: Path, notes: Notes) -> Image.Image:
    """A grey image of 8 bits from one of 16, or of 32 bits, whose files do not say which number is white."""
    from PIL import Image

    samples: Any = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        white = _RANGES[-1]
    else:
        white = _white(samples, path)
        notes.add(f"samples of 32 bits, where {white:g} is taken for white", path)
    return Image.fromarray(np.rint(samples * (255.0 / white)).astype("uint8"))


def _white(samples: Any, path: Path) -> float:
    low, high = float(samples.min()), float(samples.max())
    whole = samples.dtype.kind in "iu"
    fitting = [white for white in _RANGES[whole:] if low >= 0 and high <= white]
    if not fitting:  # NaN too
        raise DataError(
            f"its samples of 32 bits go from {low:g} to {high:g}, so it is not known what is white; save it with "
            "8 or 16 bits",
            [path],
        )
    return fitting[0]


def cover(image: Image.Image, width: int, height: int) -> Tensor:
    """Resizes until both sides cover the target, and cuts out the centre.

    Returns:
        [channels, height, width], values 0 to 1.
    """
    from PIL import Image, ImageOps

    return unit_tensor(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def unit_tensor(image: Image.Image) -> Tensor:
    """An image of 8 bits as [channels, height, width], values 0 to 1."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, -1).permute(2, 0, 1).float() / 255.0
