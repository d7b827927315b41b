"""Which file says what a picture shows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from adapterkit.training.data_files import Notes, gather
from adapterkit.training.pictures.tables import TABLES, several, table_captions
from adapterkit.training.text_files import read_text

ENDINGS = (".txt", ".caption")
_SECOND = "left out, a second caption of the same image"


def captions_of(
    pictures: Sequence[Path], files: Sequence[Path], column: str | None, notes: Notes, *, lines: bool = False
) -> dict[Path, tuple[tuple[str, ...], Path]]:
    """Of every picture that has any its captions, and the file that says so.

    A text file of the picture's name comes before a table, and of several tables the one nearest to the picture.

    Args:
        pictures: The pictures.
        files: All files of the folder, the pictures too.
        column: Of tables, see `table_captions`.
        notes: Takes up what is not used, and captions that are empty.
        lines: Whether each line of a text file is a caption; otherwise they are one together.

    Raises:
        DataError: A caption is no text, or a table no table.
    """
    texts = _texts_of(pictures, files, notes)
    reading = functools.partial(_captions, lines=lines, notes=notes)
    read = dict(zip(texts, gather(texts.values(), reading), strict=True))
    found = {path: (read[stem], texts[stem]) for path in pictures if (stem := path.with_suffix("")) in texts}
    for stem in (stem for stem, captions in read.items() if not any(captions)):
        notes.add("empty caption", texts[stem])
    known = set(pictures)
    for table in _tables(files):
        for path, captions in table_captions(table, column, notes).items():
            if path in found:
                notes.add(_SECOND, path)
            elif path in known:
                found[path] = (captions, table)
                if not any(captions):
                    notes.add("empty caption", path)
    return found


def unused_captions(pictures: Sequence[Path], files: Sequence[Path]) -> list[Path]:
    """Texts that may have been meant for a picture of another name."""
    stems = {path.with_suffix("") for path in pictures}
    return [path for path in files if path.suffix.lower() in ENDINGS and path.with_suffix("") not in stems]


def is_caption(path: Path) -> bool:
    """Whether a file is there to say what pictures show."""
    return path.suffix.lower() in ENDINGS or path.name.lower() in TABLES


def _texts_of(pictures: Sequence[Path], files: Sequence[Path], notes: Notes) -> dict[Path, Path]:
    """The captions' files by what they share with their pictures."""
    stems = {path.with_suffix("") for path in pictures}
    texts: dict[Path, Path] = {}
    for ending in ENDINGS:
        for path in (path for path in files if path.suffix.lower() == ending):
            stem = path.with_suffix("")
            if stem not in stems:
                notes.add("left out, a caption without an image", path)
            elif texts.setdefault(stem, path) != path:
                notes.add(_SECOND, path)
    return texts


def _tables(files: Sequence[Path]) -> list[Path]:
    """The tables, the deepest first."""
    return sorted((path for path in files if path.name.lower() in TABLES), key=lambda path: -len(path.parts))


def _captions(path: Path, *, lines: bool, notes: Notes) -> tuple[str, ...]:
    text = read_text(path)
    found = several(text.splitlines())
    if lines:
        return found
    if len(found) > 1:
        notes.add("of several lines, taken as one caption (options.caption_lines: true draws one of them)", path)
    return (" ".join(text.split()),)
