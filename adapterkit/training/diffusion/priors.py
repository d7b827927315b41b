"""Pictures that the base makes of what it is not to lose, for concepts that ask for them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterkit.errors import DataError
from adapterkit.training.pictures.options import Concept

Draw = Callable[[str, int], Any]
"""A caption and a seed to a picture of Pillow's."""


def fill(concept: Concept, folder: Path, there: int, draw: Draw, tell: Callable[[str], object]) -> bool:
    """Makes as many pictures as a folder lacks, each from a seed that its name says; those that are there stay.

    Args:
        concept: Says how many pictures there should be, and of what.
        folder: Is made where it is not there.
        there: How many there are, of the base or not.
        draw: Makes one.
        tell: Is told that it takes time.

    Returns:
        Whether any was made.

    Raises:
        DataError: They cannot be written.
    """
    free = (seed for seed in range(concept.generate) if not _path(folder, seed).exists())
    seeds = [seed for seed, _ in zip(free, range(concept.generate - there), strict=False)]
    if seeds:
        tell(f"data: the base makes {len(seeds)} pictures of {concept.caption!r} in {folder}")
    for seed in seeds:
        _write(draw(concept.caption or "", seed), _path(folder, seed))
    return bool(seeds)


def _path(folder: Path, seed: int) -> Path:
    return folder / f"base_{seed:06d}.png"


def _write(picture: Any, path: Path) -> None:
    """Whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as place:
            picture.save(Path(place) / path.name)
            (Path(place) / path.name).replace(path)
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror})", [path]) from error
