"""Tables of pictures and their classes: CSV, TSV, JSON, JSONL or Parquet with a column of files and one of labels."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterkit.errors import DataError, RowError
from adapterkit.training.classification.examples import Example
from adapterkit.training.data_files import Notes, is_hidden, listed
from adapterkit.training.faults import Faults
from adapterkit.training.image_files import ENDINGS
from adapterkit.training.language.rows import Row, read_rows

_TABLES = frozenset({".csv", ".tsv", ".json", ".jsonl", ".parquet"})
_USUAL = {
    "file": ("file_name", "file", "filename", "path", "image", "image_path", "filepath", "image_id", "id"),
    "label": ("label", "labels", "class", "classes", "category", "categories", "tags", "target"),
    "split": ("split", "part", "subset"),
}
_SEPARATORS = re.compile(r"[|;,]")
_ONE_HOT = {"0": False, "1": True, "0.0": False, "1.0": True}


@dataclass(frozen=True)
class Columns:
    """How tables are read.

    Attributes:
        names: What the columns `file`, `label` and `split` are called, where they are not called as usual.
        folder: What the files are relative to; the table's own folder where that is None.
        several: Whether a picture may be of several classes: a cell then holds several, separated by `|`, `;` or `,`.
    """

    names: Mapping[Any, str]
    folder: Path | None = None
    several: bool = False


def only_table(folder: Path) -> Path | None:
    """The table that lies in a folder.

    Raises:
        DataError: There are several.
    """
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in _TABLES and not is_hidden(path))
    if len(tables) > 1:
        raise DataError(f"data {folder} holds several tables; name one of them as data", tables)
    return tables[0] if tables else None


def table_examples(table: Path, columns: Columns, parts: Mapping[str, str], notes: Notes) -> list[Example]:
    """The pictures of a table, in its order; rows of one picture are put together.

    Args:
        table: The file.
        columns: How it is read.
        parts: What cells of the column `split` mean.
        notes: Takes up which columns are not read.

    Raises:
        DataError: It is no such table, or names files that are not there.
    """
    if table.suffix.lower() not in _TABLES:
        raise DataError(f"is no table with an ending that is read ({', '.join(sorted(_TABLES))})", [table])
    rows = read_rows([table])
    if not rows:
        raise DataError("has no rows", [table])
    reading = _reading(table, list(rows[0].values), rows, columns)
    read = {*reading.hot, reading.file, reading.label, reading.split}
    if unread := [name for name in rows[0].values if name not in read]:
        notes.add(f"columns that are not read: {listed(unread)}; in", table)
    folder = table.parent if columns.folder is None else columns.folder
    missing: list[Path] = []
    found: dict[Path, Example] = {}
    faults = Faults()
    for row in rows:
        try:
            path = _file(folder, row, reading.file)
            if not path.is_file():
                missing.append(path)
                continue
            example = Example(path, _names(row, reading, several=columns.several), _part(row, reading.split, parts))
            found[path] = _joined(found[path], example, row, columns) if path in found else example
        except RowError as error:
            faults.add(error)
    faults.check()
    if missing:
        raise DataError(f"{table} names files that are not there (looked in {folder}; see options.images)", missing)
    return [*found.values()]


@dataclass(frozen=True)
class _Reading:
    """The columns of a table.

    Attributes:
        file, label, split: Their names; "" where there is none.
        hot: Columns that are classes, with 0 and 1, where there is no column of labels.
    """

    file: str
    label: str
    split: str
    hot: Sequence[str] = ()


def _reading(table: Path, names: Sequence[str], rows: Sequence[Row], columns: Columns) -> _Reading:
    known = {part: _column(part, names, columns.names, table) for part in _USUAL}
    if not known["file"]:
        raise DataError(_lacking("file", names), [table])
    if known["label"]:
        return _Reading(**known)
    others = [name for name in names if name not in known.values()]
    hot = [name for name in others if all(_hot(row, name) is not None for row in rows)]
    if not columns.several or len(hot) < 2:
        raise DataError(_lacking("label", names), [table])
    return _Reading(**known, hot=hot)


def _lacking(part: str, names: Sequence[str]) -> str:
    return (
        f"has no column of {part}s by a usual name ({', '.join(_USUAL[part])}), but {', '.join(names)}; name it with "
        f"options.columns={{{part}: NAME}}"
    )


def _column(part: str, names: Sequence[str], told: Mapping[Any, str], table: Path) -> str:
    if (name := told.get(part)) is not None:
        if name not in names:
            raise DataError(f"has no column {name!r} (options.columns.{part}), but {', '.join(names)}", [table])
        return name
    plain = {name.strip().casefold(): name for name in reversed(names)}
    return next((plain[name] for name in _USUAL[part] if name in plain), "")


def _file(folder: Path, row: Row, column: str) -> Path:
    name = row.values.get(column)
    if not isinstance(name, (str, int)) or not str(name).strip() or "\0" in str(name):
        raise row.error(f"must name a file as {column!r}, not {name!r:.60}")
    path = Path(os.path.normpath(folder / str(name).strip()))
    if path.is_file() or path.suffix.lower() in ENDINGS:
        return path
    beside = (path.with_name(path.name + ending) for ending in sorted(ENDINGS))
    return next((file for file in beside if file.is_file()), path)


def _names(row: Row, reading: _Reading, *, several: bool) -> tuple[str, ...]:
    if reading.hot:
        return tuple(name for name in reading.hot if _hot(row, name))
    value = row.values.get(reading.label)
    if several:
        cells = value if isinstance(value, list) else _SEPARATORS.split(_text(value, row, reading.label, empty=True))
        return tuple(dict.fromkeys(name for cell in cells if (name := _text(cell, row, reading.label, empty=True))))
    return (_text(value, row, reading.label),)


def _text(value: Any, row: Row, column: str, *, empty: bool = False) -> str:
    text = "" if value is None else str(value).strip()
    if isinstance(value, (list, dict)):
        raise row.error(f"has several labels as {column!r}: {value!r:.60}; set options.multi_label=true")
    if text or empty:
        return text
    raise row.error(f"has no label as {column!r}")


def _hot(row: Row, name: str) -> bool | None:
    return _ONE_HOT.get(str(row.values.get(name)).strip())


def _part(row: Row, column: str, parts: Mapping[str, str]) -> str:
    if not column:
        return ""
    cell = str(row.values.get(column)).strip()
    if cell.casefold() not in parts:
        raise row.error(f"must have one of {', '.join(parts)} as {column!r}, not {cell!r:.60}")
    return parts[cell.casefold()]


def _joined(one: Example, other: Example, row: Row, columns: Columns) -> Example:
    """Two rows of one picture."""
    if one.part != other.part:
        raise row.error(f"has {one.path.name} in a second part of the split")
    if not columns.several and one.names != other.names:
        raise row.error(
            f"says that {one.path.name} is of {other.names[0]!r}, and one before of {one.names[0]!r}; where pictures "
            "are of several classes, set options.multi_label=true"
        )
    return replace(one, names=tuple(dict.fromkeys((*one.names, *other.names))))
