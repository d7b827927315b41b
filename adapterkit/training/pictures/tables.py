"""Captions in a table beside the pictures: `metadata.jsonl` or `metadata.csv`, as HF's image folders have them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterkit.errors import DataError, shown
from adapterkit.training.data_files import Notes
from adapterkit.training.text_files import read_text

TABLES = ("metadata.jsonl", "metadata.csv")
_FILE = "file_name"
_CAPTIONS = ("text", "caption", "prompt")


def table_captions(table: Path, column: str | None, notes: Notes) -> dict[Path, str]:
    """The captions of a table, by the files that they are of.

    Args:
        table: One of `TABLES`; its file names are relative to its folder.
        column: Which holds the captions; the first of text, caption, prompt where that is None.
        notes: Takes up rows of files that are not there, and a table without captions.

    Raises:
        DataError: It is no table, it names no files, or there is no such column.
    """
    rows = list(_rows(table))
    names = list(dict.fromkeys(name for row in rows for name in row))
    if rows and _FILE not in names:
        raise DataError(f"has no column {_FILE!r}, which names the pictures, but {', '.join(names)}", [table])
    found = column or next((name for name in _CAPTIONS if name in names), None)
    if found is None:
        notes.add(f"left out, a table without captions ({', '.join(_CAPTIONS)}, or options.caption_column)", table)
        return {}
    if found not in names:
        raise DataError(f"has no column {shown(found)} (options.caption_column), but {', '.join(names)}", [table])
    captions: dict[Path, str] = {}
    for row in rows:
        name, caption = row.get(_FILE), row.get(found)
        path = Path(os.path.normpath(table.parent / name)) if isinstance(name, str) and name else None
        if path is None:
            raise DataError(f"has a row without a {_FILE}: {shown(dict(row))}", [table])
        if not path.is_file():
            notes.add("named in a table, but not there", path)
        elif isinstance(caption, str):
            captions[path] = _words(caption, table)
    return captions


def _words(caption: str, table: Path) -> str:
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the caption {shown(caption)} holds half a character ({error.reason})", [table]) from error
    return " ".join(caption.split())


def _rows(table: Path) -> Iterator[Mapping[str, Any]]:
    text = read_text(table)
    return _comma_separated(text, table) if table.suffix.lower() == ".csv" else _lines(text, table)


def _comma_separated(text: str, table: Path) -> Iterator[Mapping[str, Any]]:
    try:
        for row in csv.DictReader(io.StringIO(text), restkey="", strict=True):
            if "" in row:
                raise DataError(f'a row has too many cells; put "" around captions with commas: {shown(row)}', [table])
            yield row
    except csv.Error as error:
        raise DataError(f"is no table of comma-separated values ({error})", [table]) from error


def _lines(text: str, table: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} is no JSON ({error})", [table]) from error
        if not isinstance(row, dict):
            raise DataError(f'line {number} must be an object such as {{"{_FILE}": "a.png", "text": "a cat"}}', [table])
        yield row
