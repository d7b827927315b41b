"""A folder of pictures as people have it: captions in text files or tables, repeats in names, masks beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import DataError
from adapterkit.training.data_files import SPLITS, Notes, listed, walk
from adapterkit.training.image_files import ENDINGS
from adapterkit.training.pictures.caption_files import captions_of, is_caption, unused_captions
from adapterkit.training.pictures.mask_files import masks_beside, masks_in
from adapterkit.training.pictures.named_folders import Named, named

BESIDE = "files"
"""For `Reading.masks`: a mask lies beside its picture."""


@dataclass(frozen=True)
class Found:
    """A picture's file and what lies in the folder about it.

    Attributes:
        path: The picture.
        captions: What it shows; of several, one draw says one.
        source: The file that says so.
        mask: The picture's mask in a file of its own.
        repeats: How often its folder's name says that it is shown.
    """

    path: Path
    captions: tuple[str, ...]
    source: Path | None = None
    mask: Path | None = None
    repeats: int = 1

    @property
    def caption(self) -> str:
        """The first."""
        return self.captions[0]


@dataclass(frozen=True)
class Reading:
    """How a folder is read.

    Attributes:
        caption: For pictures without one; where it is None the name in `10_name` is.
        column: Of tables, which holds the captions.
        lines: Whether each line of a text file is a caption.
        masks: A folder with the masks, or `BESIDE`; None where files hold none.
        named_repeats: Whether `10_name` means that what lies there is shown ten times.
        apart: A folder that holds no data, even where it lies in that of the data.
    """

    caption: str | None = None
    column: str | None = None
    masks: Path | str | None = None
    named_repeats: bool = True
    apart: Path | None = None
    lines: bool = False

    def find(self, folder: Path, notes: Notes) -> list[Found]:
        """The pictures of a folder and its subfolders, sorted by path.

        Raises:
            DataError: There is no such folder or no picture in it; pictures lack a caption and there is none for all;
                a caption is no text.
        """
        files = self._without_others(walk(folder, notes), folder)
        beside = masks_beside(files)
        pictures = _pictures_among(files, set(beside.values()), folder, notes)
        _refuse_splits(folder, pictures)
        captions = captions_of(pictures, files, self.column, notes, lines=self.lines)
        folders = dict.fromkeys(path.parent for path in pictures)
        names = named(folders, folder, notes) if self.named_repeats else dict.fromkeys(folders, Named())
        spare = {path: self._spare(names[path.parent]) for path in pictures if path not in captions}
        self._refuse_lacking([path for path, text in spare.items() if text is None], pictures, files, folder)
        masks = self._masks(pictures, beside, folder, notes)
        return [
            Found(path, *captions.get(path, ((spare.get(path) or "",), None)), masks.get(path), repeats)
            for path in pictures
            for repeats in (names[path.parent].repeats,)
        ]

    def _without_others(self, files: Sequence[Path], folder: Path) -> list[Path]:
        """Without masks in a folder of their own, and what is apart."""
        others = [one.resolve() for one in (self.masks, self.apart) if isinstance(one, Path)]
        top = folder.resolve()
        within = {folder / one.relative_to(top) for one in others if one.is_relative_to(top)}
        return [path for path in files if within.isdisjoint(path.parents)]

    def _spare(self, name: Named) -> str | None:
        """What a picture without a caption is said to show."""
        return self.caption if self.caption is not None else name.caption or None

    def _refuse_lacking(
        self, lacking: Sequence[Path], pictures: Sequence[Path], files: Sequence[Path], folder: Path
    ) -> None:
        if not lacking:
            return
        unused = [path.name for path in unused_captions(pictures, files)]
        told = f". Captions without an image: {listed(unused)}. Without a caption" if unused else ""
        raise DataError(
            f"{len(lacking)} of {len(pictures)} images in {folder} lack a caption; write NAME.txt beside each, "
            f"or set options.caption for all that have none{told}",
            lacking,
        )

    def _masks(
        self, pictures: Sequence[Path], beside: dict[Path, Path], folder: Path, notes: Notes
    ) -> dict[Path, Path]:
        if isinstance(self.masks, Path):
            return masks_in(self.masks, pictures, folder, notes)
        if self.masks == BESIDE:
            return beside
        for mask in beside.values():
            notes.add("left out, a mask (options.masks: files would use it)", mask)
        return {}


def _pictures_among(files: Sequence[Path], masks: set[Path], folder: Path, notes: Notes) -> list[Path]:
    for path in files:
        if path.suffix.lower() not in ENDINGS and not is_caption(path):
            notes.add("left out, not a kind of image that is read", path)
    pictures = [path for path in files if path.suffix.lower() in ENDINGS and path not in masks]
    if not pictures:
        raise DataError(f"data {folder} holds no image ({', '.join(sorted(ENDINGS))})")
    return pictures


def _refuse_splits(folder: Path, pictures: Sequence[Path]) -> None:
    """Pictures to measure with are not trained on."""
    tops = {parts[0] if len(parts := path.relative_to(folder).parts) > 1 else "" for path in pictures}
    if len(tops) > 1 and all(name.casefold() in SPLITS for name in tops):
        told = ", ".join(sorted(tops))
        raise DataError(f"data {folder} holds {told}: parts of one set of data; name one of them: {folder}/{min(tops)}")
