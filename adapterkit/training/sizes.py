"""Sizes of images, as run files give them and models tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import PlainValidator

Size = tuple[int, int]
"""Height and width in pixels."""


def _sides(value: Any) -> Any:
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    if value is None or (len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)):
        return value
    raise ValueError("must be a side in pixels, or [height, width]")


Resolution = Annotated[int | Sequence[int] | None, PlainValidator(_sides)]
"""The side of a square, or [height, width], or nothing."""


def size_of(told: object) -> Size | None:
    """The size that one number or two are; None for anything else."""
    if isinstance(told, int):
        return told, told
    if isinstance(told, (tuple, list)) and len(told) == 2:
        return int(told[0]), int(told[1])
    return None
