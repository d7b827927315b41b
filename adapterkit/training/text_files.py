"""Reading text as editors write it, with or without a byte order mark."""

from __future__ import annotations

import codecs
from pathlib import Path

from adapterkit.errors import DataError

_MARKS = {  # the longer first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def read_text(path: Path) -> str:
    """The text of a file, with lines that end in a newline alone and without byte order marks.

    Raises:
        DataError: It is no text, or of an encoding that it does not tell.
    """
    try:
        data = path.read_bytes()
        encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
        text = data.decode(encoding)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", [path]) from error
    except UnicodeDecodeError as error:
        raise DataError(f"cannot be read as UTF-8 text ({error}); save it as UTF-8", [path]) from error
    if "\0" in text:
        raise DataError("holds zero bytes: no text, or UTF-16 without a byte order mark; save it as UTF-8", [path])
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
