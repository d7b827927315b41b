"""Reading text as editors write it, with or without a byte order mark: a file or a folder of them, plain or JSONL."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from adapterkit.errors import DataError
from adapterkit.training.data_files import Notes, gather, walk

_ENDINGS = (".txt", ".md", ".jsonl")
_ROWS = frozenset({".json", ".csv", ".tsv"})  # which would be trained on with their brackets and commas

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


def text_files(path: Path, notes: Notes | None = None) -> list[Path]:
    """The file, or a folder's files in order of their paths, that hold text.

    Raises:
        DataError: There is none.
    """
    notes = notes or Notes(path)
    if path.is_dir():
        found = walk(path, notes)
    elif path.suffix.lower() in _ROWS:
        raise DataError(f"data {path} holds rows, not text; write it as .jsonl, with a text in each line")
    else:
        found = [path] if path.is_file() else []
    files = [file for file in found if file == path or file.suffix.lower() in _ENDINGS]
    for file in found:
        if file not in files:
            notes.add("left out, not a kind of text that is read", file)
    if not files:
        raise DataError(f"data {path} is neither a file nor a folder with {', '.join(_ENDINGS)} files")
    return files


def read_documents(path: Path, notes: Notes | None = None) -> list[str]:
    """The texts of a file, or of a folder's files in order of their paths: `.jsonl` by line, others whole.

    Raises:
        DataError: There is no text, a file holds none, or a line is not `{"text": "..."}`.
    """
    notes = notes or Notes(path)
    files = text_files(path, notes)
    read = zip(files, gather(files, _documents), strict=True)
    texts = [text for file, found in read for text in _not_empty(file, found, notes)]
    if not texts:
        raise DataError("no text in the data", files)
    return texts


def _not_empty(file: Path, texts: list[str], notes: Notes) -> list[str]:
    kept = [text for text in texts if text.strip()]
    if len(kept) < len(texts) or not texts:
        notes.add("left out, texts without a word" if kept else "left out, a file without a word", file)
    return kept


def _documents(file: Path) -> list[str]:
    text = read_text(file)
    if file.suffix.lower() != ".jsonl":
        return [text]
    return [_text_of(line, number, file) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _text_of(line: str, number: int, file: Path) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"line {number} is no JSON ({error})", [file]) from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f'line {number} must be an object with a text, such as {{"text": "..."}}', [file])
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:
        raise DataError(f"line {number} holds half a character ({error.reason})", [file]) from error
    return record["text"]
