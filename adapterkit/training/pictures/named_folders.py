"""What names of folders say in the manner of kohya's scripts: `10_ink drawing` is shown ten times, an ink drawing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adapterkit.training.data_files import Notes

_NAME = re.compile(r"(\d{1,3})_(.+)")  # no year


@dataclass(frozen=True)
class Named:
    """What a name says of the pictures below it.

    Attributes:
        repeats: How often each is shown, at least once.
        caption: For those that have none; empty where the name says nothing.
    """

    repeats: int = 1
    caption: str = ""


def named(folders: Iterable[Path], top: Path, notes: Notes) -> dict[Path, Named]:
    """Of every folder what its name says, or else that of the nearest one above it, up to `top`."""
    return {folder: _named(folder, top, notes) for folder in folders}


def _named(folder: Path, top: Path, notes: Notes) -> Named:
    while True:
        match = _NAME.fullmatch(folder.resolve().name if folder == top else folder.name)
        if match and int(match[1]):
            notes.add(f"shown {int(match[1])} times each, as the folder's name says", folder)
            return Named(int(match[1]), match[2].strip())
        if folder == top:
            return Named()
        folder = folder.parent
