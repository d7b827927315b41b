"""What pictures there are: every file looked at once, before anything is loaded."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import DataError
from adapterkit.training.data_files import Notes, content_key, name_of
from adapterkit.training.data_record import DataRecord
from adapterkit.training.image_files import image_size
from adapterkit.training.image_folder import examine_all
from adapterkit.training.pictures.folder import Found
from adapterkit.training.pictures.masks import Mask
from adapterkit.training.pictures.options import ALPHA, RANDOM, Concept, PictureOptions
from adapterkit.training.sizes import Size


@dataclass(frozen=True)
class Picture:
    """A picture of a concept.

    Attributes:
        found: Its file, and what lies beside it.
        concept: Whose keys it has.
        size: Height and width, upright.
        key: `content_key` of its file.
        mask: Which of its parts are learnt; None for all.
    """

    found: Found
    concept: Concept
    size: Size
    key: str
    mask: Mask | None = None

    @property
    def path(self) -> Path:
        """Its file."""
        return self.found.path

    @property
    def captions(self) -> list[str]:
        """What it shows, with the trigger."""
        return [self.concept.wording.whole(caption) for caption in self.found.captions]

    @property
    def caption(self) -> str:
        """The first of these."""
        return self.captions[0]

    @property
    def longest_caption(self) -> str:
        """The one with most words."""
        return max(self.captions, key=lambda caption: len(caption.split()))

    @property
    def repeats(self) -> int:
        """How often it is shown before others are shown again."""
        return self.concept.repeats or self.found.repeats


def survey(data: Path, options: PictureOptions, workers: int = 0) -> tuple[list[Picture], DataRecord]:
    """Finds the pictures of all concepts and decodes every one, in that many processes.

    Returns:
        The pictures, and what a run keeps of them: not those of folders that the base fills, which would be other ones
        after it has.

    Raises:
        DataError: Naming the files at fault.
    """
    notes = Notes(data)
    pictures = [
        picture for concept in options.folders() for picture in pictures_of(concept, data, options, notes, workers)
    ]
    shown = Counter(picture.path.resolve() for picture in pictures)
    for path in dict.fromkeys(picture.path for picture in pictures if shown[picture.path.resolve()] > 1):
        notes.add("in folders of several concepts, and shown for each", path)
    if all(picture.concept.prior for picture in pictures):
        raise DataError(f"data {data} holds nothing to learn: all of options.concepts are priors")
    return pictures, DataRecord(_files(pictures, data), notes=notes.sentences(), facts=_facts(pictures))


def pictures_of(concept: Concept, data: Path, options: PictureOptions, notes: Notes, workers: int = 0) -> list[Picture]:
    """The pictures of one concept; none where its folder is empty or absent and the base fills it.

    Raises:
        DataError: Naming the files at fault.
    """
    folder = data / concept.folder
    if concept.generate and not (folder.is_dir() and any(folder.iterdir())):
        return []
    found = {item.path: item for item in options.reading(concept, data).find(folder, notes)}
    looked = examine_all(list(found), notes, workers, functools.partial(_look, found, concept))
    pictures = [Picture(found[path], concept, *seen) for path, seen in zip(found, looked, strict=True)]
    if concept.masks not in (None, RANDOM):
        for picture in (picture for picture in pictures if picture.mask is None):
            notes.add("without a mask, and learnt whole", picture.path)
    return pictures


def _look(found: Mapping[Path, Found], concept: Concept, path: Path, notes: Notes) -> tuple[Size, str, Mask | None]:
    """A picture's size, its key, and its mask."""
    size, opacity = image_size(path, notes), concept.masks == ALPHA
    source = path if opacity else found[path].mask
    return size, content_key(path), None if source is None else Mask.at(source, opacity=opacity, picture=size)


def _facts(pictures: Sequence[Picture]) -> dict[str, str]:
    heights, widths = zip(*(picture.size for picture in pictures), strict=True)
    sizes = dict.fromkeys((f"{min(widths)} x {min(heights)}", f"{max(widths)} x {max(heights)}"))
    longest = max(pictures, key=lambda picture: len(picture.longest_caption.split()))
    told = {
        "pictures": f"{len(pictures)}, of {' to '.join(sizes)} pixels",
        "without a caption of their own": str(sum(picture.found.source is None for picture in pictures)),
        "with a mask": str(sum(picture.mask is not None for picture in pictures)),
        "with several captions": str(sum(len(picture.captions) > 1 for picture in pictures)),
        "longest caption": f"{len(longest.longest_caption.split())} words, of {longest.path.name}",
    }
    return {name: value for name, value in told.items() if value != "0"}


def _files(pictures: Sequence[Picture], data: Path) -> dict[str, str]:
    """What a record keeps: pictures, masks, captions."""
    kept = [picture for picture in pictures if not picture.concept.generate]
    keys = dict(_keys(kept))
    sources = {picture.found.source for picture in kept if picture.found.source is not None}
    return {name_of(path, data): key for path, key in keys.items()} | {
        name_of(path, data): content_key(path) for path in sorted(sources)
    }


def _keys(pictures: Sequence[Picture]) -> Iterator[tuple[Path, str]]:
    for picture in pictures:
        yield picture.path, picture.key
        if picture.mask is not None:
            yield picture.mask.path, picture.mask.key
