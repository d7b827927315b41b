"""Masks in files of their own: white is learnt, black is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapterkit.training.data_files import Notes, walk
from adapterkit.training.image_files import ENDINGS

_MARKS = (".mask", "-masklabel")


def masks_beside(files: Sequence[Path]) -> dict[Path, Path]:
    """Of every picture with a mask beside it the mask: `a.mask.png`, or OneTrainer's `a-masklabel.png`, of `a.jpg`."""
    images = [path for path in files if path.suffix.lower() in ENDINGS]
    by_stem = {path.with_suffix(""): path for path in images}
    found: dict[Path, Path] = {}
    for path in images:
        masks = (by_stem.get(path.with_name(path.stem + mark)) for mark in _MARKS)
        if mask := next((mask for mask in masks if mask is not None), None):
            found[path] = mask
    return found


def masks_in(folder: Path, pictures: Sequence[Path], top: Path, notes: Notes) -> dict[Path, Path]:
    """Of every picture with a mask in that folder the mask: there it has the name that the picture has below `top`.

    Raises:
        DataError: There is no such folder.
    """
    masks = {path.relative_to(folder).with_suffix(""): path for path in walk(folder, notes)}
    names = {path: path.relative_to(top).with_suffix("") for path in pictures}
    return {path: masks[name] for path, name in names.items() if name in masks}
