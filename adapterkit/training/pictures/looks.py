"""The ways in which one picture is shown: where it is cut, mirrored or not, with a mild change of colour."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapterkit.training.image_files import unit_tensor
from adapterkit.training.order import derive_seed
from adapterkit.training.pictures.buckets import Frame

if TYPE_CHECKING:
    from PIL import Image

Tint = tuple[float, float, float]
"""Factors on brightness, contrast and saturation."""
Box = tuple[float, float, float, float]
"""Top, left, bottom and right, as shares of height and width."""


@dataclass(frozen=True)
class Look:
    """One way to show a picture.

    Attributes:
        frame: What is kept of it, at which size.
        mirrored: Whether left and right are exchanged.
        tint: How its colours are changed.
        hole: A rectangle that is to be painted anew, where no mask says what is.
    """

    frame: Frame
    mirrored: bool = False
    tint: Tint = (1.0, 1.0, 1.0)
    hole: Box | None = None

    def of(self, image: Image.Image) -> Tensor:
        """A picture of 8 bits shown so.

        Returns:
            [channels, height, width], values 0 to 1.
        """
        from PIL import Image, ImageEnhance

        shown = self._framed(image, Image.Resampling.LANCZOS)
        changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for change, factor in zip(changes, self.tint, strict=True):
            shown = change(shown).enhance(factor) if factor != 1 else shown
        return unit_tensor(shown)

    def of_mask(self, mask: Image.Image) -> Tensor:
        """A grey mask of the picture's shape and any size, cut as the picture is: [1, height, width], 0 to 1."""
        from PIL import Image

        return unit_tensor(self._framed(mask, Image.Resampling.BOX))

    def of_hole(self) -> Tensor | None:
        """The hole as a mask [1, height, width], of 0 and 1; None where there is none."""
        if self.hole is None:
            return None
        mask = torch.zeros(1, *self.frame.size)
        top, left, bottom, right = (
            round(part * side) for part, side in zip(self.hole, self.frame.size * 2, strict=True)
        )
        mask[:, top : max(bottom, top + 1), left : max(right, left + 1)] = 1
        return mask

    def _framed(self, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
        from PIL import ImageOps

        height, width = self.frame.size
        shown = ImageOps.fit(image, (width, height), resampling, centering=(self.frame.at, self.frame.at))
        return ImageOps.mirror(shown) if self.mirrored else shown

    @property
    def conditioning(self) -> list[int]:
        """See `Frame.conditioning`."""
        return self.frame.conditioning(mirrored=self.mirrored)


@dataclass(frozen=True)
class Variety:
    """How many looks a picture has.

    Attributes:
        flip: Whether each is there mirrored too.
        crops: Whether other parts than the middle are kept.
        colour: How far brightness, contrast and saturation go from 1, at most.
        holes: Whether each has another rectangle that is to be painted anew.
        count: Looks of a picture with crops, colours or holes, before they are mirrored.
    """

    flip: bool = False
    crops: bool = False
    colour: float = 0.0
    holes: bool = False
    count: int = 4

    def looks(self, frame: Frame, key: str) -> list[Look]:
        """The different ones, which follow from the frame and the picture's key.

        Crops go in equal steps from one end of the picture to the other. The first look has the picture's own colours.
        """
        count = self.count if self.crops or self.colour or self.holes else 1
        places = torch.linspace(0, 1, count).tolist() if self.crops and count > 1 and frame.slack else [frame.at]
        places = itertools.islice(itertools.cycle(places), count)
        plain = [
            Look(replace(frame, at=at), tint=self._tint(key, number), hole=self._hole(key, number))
            for number, at in enumerate(places)
        ]
        sides = [False, True] if self.flip else [False]
        return list(dict.fromkeys(replace(look, mirrored=side) for look in plain for side in sides))

    def _tint(self, key: str, number: int) -> Tint:
        if not self.colour or not number:
            return Look.tint
        generator = torch.Generator().manual_seed(derive_seed("tint", key, number))
        brightness, contrast, saturation = (1 + self.colour * (2 * torch.rand(3, generator=generator) - 1)).tolist()
        return brightness, contrast, saturation

    def _hole(self, key: str, number: int) -> Box | None:
        """Sides of a quarter to three quarters, anywhere."""
        if not self.holes:
            return None
        generator = torch.Generator().manual_seed(derive_seed("hole", key, number))
        height, width, down, across = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        height, width = 0.25 + height / 2, 0.25 + width / 2
        top, left = down * (1 - height), across * (1 - width)
        return top, left, top + height, left + width
