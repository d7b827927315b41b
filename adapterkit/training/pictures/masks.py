"""Which parts of a picture are learnt: white or opaque is, black or transparent is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import DataError
from adapterkit.training.data_files import content_key
from adapterkit.training.image_files import open_alpha, open_image
from adapterkit.training.sizes import Size

if TYPE_CHECKING:
    from PIL import Image

_OFF = 0.02  # by which the shapes of a mask and its picture may differ


@dataclass(frozen=True)
class Mask:
    """Where a picture's mask is.

    Attributes:
        path: The file that holds it.
        opacity: Whether it is the opacity of that file's pixels.
        key: `content_key` of the file.
    """

    path: Path
    opacity: bool
    key: str

    @classmethod
    def at(cls, path: Path, *, opacity: bool, picture: Size) -> Mask | None:
        """A mask for a picture of that height and width; None where the file has no opacity.

        Raises:
            DataError: It cannot be read, has another shape than the picture, or leaves nothing of it.
        """
        image = open_alpha(path) if opacity else open_image(path, "L")
        if image is None:
            return None
        expected = image.width * picture[0] / picture[1]
        if abs(image.height - expected) > max(1.0, _OFF * expected):
            raise DataError(
                f"its mask has another shape: {image.height} x {image.width} pixels, and the picture "
                f"{picture[0]} x {picture[1]}",
                [path],
            )
        if image.getextrema()[1] == 0:
            raise DataError("its mask is black, so nothing of it would be learnt", [path])
        return cls(path, opacity, content_key(path))

    def read(self) -> Image.Image:
        """In grey, of 8 bits.

        Raises:
            DataError: It cannot be read any more.
        """
        image = open_alpha(self.path) if self.opacity else open_image(self.path, "L")
        if image is None:
            raise DataError("has no transparent parts any more", [self.path])
        return image
