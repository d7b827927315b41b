"""Captions in a table beside the pictures, such as `metadata.jsonl` and `metadata.csv` of HF's image folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from adapterkit.errors import DataError, shown
from adapterkit.training.data_files import Notes
from adapterkit.training.faults import Faults
from adapterkit.training.language.rows import read_rows

TABLES = tuple(f"metadata{ending}" for ending in (".jsonl", ".json", ".csv", ".tsv", ".parquet"))
_FILE = "file_name"
_CAPTIONS = ("text", "caption", "prompt")


def table_captions(table: Path, column: str | None, notes: Notes) -> dict[Path, tuple[str, ...]]:
    """The captions of a table, by the files that they are of: several where a row has a list of them.

    Args:
        table: One of `TABLES`; its file names are relative to its folder.
        column: Which holds the captions; the first of text, caption, prompt where that is None.
        notes: Takes up rows of files that are not there, and a table without captions.

    Raises:
        DataError: It is no table, it names no files, there is no such column, or a caption is no text.
        MissingDependencyError: It is of Parquet, and nothing reads that.
    """
    rows = read_rows([table])
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    if rows and _FILE not in names:
        raise DataError(f"has no column {_FILE!r}, which names the pictures, but {', '.join(names)}", [table])
    found = column or next((name for name in _CAPTIONS if name in names), None)
    if found is None:
        notes.add(f"left out, a table without captions ({', '.join(_CAPTIONS)}, or options.caption_column)", table)
        return {}
    if found not in names:
        raise DataError(f"has no column {shown(found)} (options.caption_column), but {', '.join(names)}", [table])
    captions: dict[Path, tuple[str, ...]] = {}
    faults = Faults()
    for row in rows:
        name, caption = row.values.get(_FILE), row.values.get(found)
        if not isinstance(name, str) or not name:
            faults.add(row.error(f"has no {_FILE}: {shown(dict(row.values))}"))
            continue
        path = Path(os.path.normpath(table.parent / name))
        if not path.is_file():
            notes.add("named in a table, but not there", path)
        elif isinstance(caption, str):
            captions[path] = (" ".join(caption.split()),)
        elif isinstance(caption, (list, tuple)) and all(isinstance(one, str) for one in caption):
            captions |= {path: several(caption)} if caption else {}
        elif caption is not None:
            faults.add(row.error(f"must have a text, or a list of texts, as {found!r}, not {caption!r:.60}"))
    faults.check()
    return captions


def several(captions: Iterable[str]) -> tuple[str, ...]:
    """Captions of one picture, each once and none empty; one that is empty where all are."""
    return tuple(dict.fromkeys(text for one in captions if (text := " ".join(one.split())))) or ("",)
