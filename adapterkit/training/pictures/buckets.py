"""Buckets: sizes of one area and many shapes, so that little of a picture is cut and a batch has one size."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from adapterkit.training.sizes import Size

_STEP = 64
_STEPS = 8  # that a side has at least, unless the model's own step is larger


def default_step(size: Size, factor: int) -> int:
    """64 pixels, less for small sizes; always a multiple of `factor`, which the model's latents need."""
    return max(factor, min(_STEP, min(size) // _STEPS) // factor * factor)


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures are brought to.

    Attributes:
        size: Height and width of the first; the others have at most its area.
        step: All other sides are multiples of it, in pixels; 0 for that size alone.
        max_aspect: The longer side by the shorter, at most.
        upscale: Whether smaller pictures are enlarged. Otherwise their own sides are cut to multiples of the step.
        longest: No other side is longer, in pixels; None for no such limit.
    """

    size: Size
    step: int
    max_aspect: float = 4.0
    upscale: bool = True
    longest: int | None = None

    @functools.cached_property
    def sizes(self) -> list[Size]:
        """All of them, sorted."""
        return sorted({self.size, *self._others()})

    def _others(self) -> set[Size]:
        if not self.step:
            return set()
        area = math.prod(self.size)
        longest = min(math.isqrt(int(area * self.max_aspect)), self.longest or area)
        sides = range(self.step, longest + 1, self.step)
        pairs = [(side, min(area // side, longest) // self.step * self.step) for side in sides]
        fitting = [(a, b) for a, b in pairs if b and max(a, b) <= self.max_aspect * min(a, b)]
        return {*fitting, *((b, a) for a, b in fitting)}

    def of(self, picture: Size) -> Size:
        """The one that cuts least of a picture of that height and width; of equal ones the largest."""
        found = min(self.sizes, key=lambda size: (round(_misfit(picture, size), 9), -math.prod(size)))
        if self.upscale or not self.step or all(mine <= its for mine, its in zip(found, picture, strict=True)):
            return found
        own = [max(self.step, side // self.step * self.step) for side in picture]
        most = int(self.max_aspect * min(own)) // self.step * self.step
        height, width = (min(side, max(most, self.step)) for side in own)
        return height, width


def _misfit(one: Size, other: Size) -> float:
    """How far two shapes are apart: 0 for the same, log 2 where half of one would be cut to fit the other."""
    return abs(math.log(one[0] * other[1]) - math.log(one[1] * other[0]))


@dataclass(frozen=True)
class Frame:
    """How a picture is laid into a size: resized until it covers it, and cut along the one side that sticks out.

    Attributes:
        picture: Height and width of the picture.
        size: Height and width that it is brought to.
        at: Where it is cut: 0 keeps its top or left, 0.5 the middle, 1 its bottom or right.
    """

    picture: Size
    size: Size
    at: float = 0.5

    @property
    def scale(self) -> float:
        """Above 1 where the picture is enlarged."""
        return max(mine / its for mine, its in zip(self.size, self.picture, strict=True))

    @property
    def resized(self) -> Size:
        """Height and width of the whole picture before it is cut."""
        height, width = (
            max(round(side * self.scale), mine) for side, mine in zip(self.picture, self.size, strict=True)
        )
        return height, width

    @property
    def corner(self) -> Size:
        """Rows above and columns left of what is kept, in pixels of the resized picture."""
        top, left = (round((whole - kept) * self.at) for whole, kept in zip(self.resized, self.size, strict=True))
        return top, left

    @property
    def slack(self) -> bool:
        """Whether a row or column can be cut at either end."""
        return self.resized != self.size

    @property
    def cut(self) -> float:
        """The share of the picture that is not seen."""
        return 1 - math.prod(self.size) / (math.prod(self.picture) * self.scale**2)

    def conditioning(self, *, mirrored: bool) -> list[int]:
        """What SDXL is told of a picture: original height and width, crop top and left, target height and width.

        Podell et al. 2023, arXiv:2307.01952, section 2.2. The crop is where the kept part lies in the mirrored picture.
        """
        top, left = self.corner
        if mirrored:
            left = self.resized[1] - self.size[1] - left
        return [*self.picture, top, left, *self.size]
