"""Reading text as editors write it, with or without a byte order mark."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from adapterkit.errors import DataError

_MARKS = {  # the longer first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file, one at a time, with their ends, which are a newline alone, and without byte order marks.

    Raises:
        DataError: It is no text, or of an encoding that it does not tell.
    """
    with _opened(path) as file:
        for line in file:
            yield _clean(line, path)


def parts_of(path: Path, size: int) -> Iterator[str]:
    """The text of a file in parts of about that many characters, which end behind a line where they can.

    Raises:
        DataError: See `lines_of`.
    """
    with _opened(path) as file:
        left, more = "", file.read(size)
        while more:
            text, more = left + _clean(more, path), file.read(size)
            half = len(text) // 2  # a short part would tell too little of what is beside its neighbours
            cut = (text.rfind("\n", half) + 1 or text.rfind(" ", half) + 1 or len(text)) if more else len(text)
            yield text[:cut]
            left = text[cut:]


def read_text(path: Path) -> str:
    """The text of a file, as `lines_of` reads it.

    Raises:
        DataError: See there.
    """
    return "".join(lines_of(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    try:
        with path.open("rb") as file:
            data = file.read(4)
        encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
        with path.open(encoding=encoding) as text:
            yield text
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", [path]) from error
    except UnicodeDecodeError as error:
        raise DataError(f"cannot be read as UTF-8 text ({error}); save it as UTF-8", [path]) from error


def _clean(text: str, path: Path) -> str:
    if "\0" in text:
        raise DataError("holds zero bytes: no text, or UTF-16 without a byte order mark; save it as UTF-8", [path])
    return text.replace("\ufeff", "")
