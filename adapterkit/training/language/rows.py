"""Rows of data files, by their endings: JSONL, JSON, CSV, TSV, Parquet; a file of plain text is one row with a text."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.errors import DataError, MissingDependencyError, RowError
from adapterkit.training.data_files import Notes, gather, walk
from adapterkit.training.faults import Faults
from adapterkit.training.text_files import lines_of, parts_of, read_text

_LONG = 1 << 18  # characters of a text that are read at a time
_BESIDE = 1000  # characters beside them, which tell the tokenizer where tokens begin and end
_AT_ONCE = 1024  # rows that are taken from a Parquet file
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "eval", "test", "testing", "dev"})


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        values: By column.
        file: Where it is from.
        number: The how manieth it is there, from 1; of JSONL its line.
        fault: Why it cannot be read, where it cannot.
        before, after: Of a part of a long text the characters beside it; "" where it begins and ends.
    """

    values: Mapping[str, Any]
    file: Path
    number: int
    fault: RowError | None = None
    before: str = ""
    after: str = ""

    def error(self, reason: str) -> RowError:
        """What is wrong with it, as an error that names row and file."""
        return RowError(self.file, self.number, reason)


def row_files(path: Path, notes: Notes | None = None) -> list[Path]:
    """The file, or a folder's files in order of their paths, that are read.

    Raises:
        DataError: There is none, its ending says nothing, or the folder holds the parts of a split data set.
    """
    notes = notes or Notes(path)
    known = ", ".join(READERS)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"data {path} has no ending that says what it holds; name it with one of {known}")
        return [path]
    if not path.is_dir():
        raise DataError(f"data {path} is neither a file nor a folder (looked in {Path.cwd()})")
    found = walk(path, notes)
    files = [file for file in found if file.suffix.lower() in READERS]
    for file in found:
        if file not in files:
            notes.add("left out, not a kind of text that is read", file)
    if not files:
        raise DataError(f"data {path} is a folder without a file that is read ({known})")
    _refuse_splits(path, files)
    return files


def _refuse_splits(folder: Path, files: list[Path]) -> None:
    """Parts of a split data set are not all to be trained on."""
    names = sorted({part for file in files for part in _split_of(file.relative_to(folder))})
    if len(names) > 1:
        raise DataError(
            f"data {folder} holds {', '.join(names)}, which are not all to be trained on; name one of them as data, "
            "and one to measure with as options.validation",
            files,
        )


def _split_of(name: Path) -> list[str]:
    first = name.parts[0].partition(".")[0]
    return [first] if first.partition("-")[0].casefold() in _SPLITS else []


def read_rows(files: Sequence[Path]) -> list[Row]:
    """The rows of files, one file after the other, all at once.

    Raises:
        DataError: Naming all files that cannot be read, with the reason of the first.
        MissingDependencyError: A Parquet file, and nothing that reads it.
    """
    return [row for rows in gather(files, _whole) for row in rows]


def _whole(file: Path) -> list[Row]:
    faults, rows = Faults(), list(rows_in(file))
    for row in rows:
        if row.fault is not None:
            faults.add(row.fault)
    faults.check()
    return rows


def rows_in(file: Path) -> Iterator[Row]:
    """The rows of a file, one at a time, those with a `fault` too.

    Raises:
        DataError: When the reader comes to where it cannot go on.
        MissingDependencyError: It is a Parquet file, and nothing is installed that reads it.
    """
    return READERS[file.suffix.lower()](file)


def _json_lines(file: Path) -> Iterator[Row]:
    return _parsed_lines(lines_of(file), file)


def _parsed_lines(lines: Iterable[str], file: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values = _object(_parsed(line, number, file), number, file)
            except RowError as error:
                yield Row({}, file, number, error)
            else:
                yield Row(values, file, number)


def _parsed(line: str, number: int, file: Path) -> Any:
    try:
        value = json.loads(line)
        if "\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise RowError(file, number, f"holds half a character ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        raise RowError(file, number, f"is no JSON ({error})") from error


def _object(value: Any, number: int, file: Path) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise RowError(file, number, 'must be an object with columns, such as {"text": "..."}')


def _json(file: Path) -> Iterator[Row]:
    """An array of objects, an object with one such array, or, as some write it, a line each. It is read whole."""
    text = read_text(file)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        yield from _parsed_lines(text.split("\n"), file)
        return
    value = _parsed(text, 1, file)
    if isinstance(value, dict):
        arrays = [one for one in value.values() if isinstance(one, list) and one and isinstance(one[0], dict)]
        value = arrays[0] if len(value) == 1 and arrays else [value]
    if not isinstance(value, list):
        raise DataError("must hold an array of objects", [file])
    for number, one in enumerate(value, 1):
        try:
            yield Row(_object(one, number, file), file, number)
        except RowError as error:
            yield Row({}, file, number, error)


def _table(file: Path) -> Iterator[Row]:
    lines = lines_of(file)
    header = next(lines, "")
    reader = csv.reader(itertools.chain([header], lines), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        rows = (line for line in reader if line)
        columns = next(rows, [])
        if len(set(columns)) < len(columns) or not all(columns):
            raise DataError(f"must begin with a line of different names of columns, not {columns!r:.80}", [file])
        for number, line in enumerate(rows, 1):
            if len(line) == len(columns):
                yield Row(dict(zip(columns, line, strict=True)), file, number)
            else:
                told = f"has {len(line)} fields, and there are {len(columns)} columns"
                yield Row({}, file, number, RowError(file, number, told))
    except csv.Error as error:
        raise DataError(f"is no table ({error}); write it as .jsonl", [file]) from error


def _parquet(file: Path) -> Iterator[Row]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{file} needs 'pyarrow', which is not installed. Run: pip install 'adapterkit[data]', or write it as "
            ".jsonl"
        ) from error
    try:
        with parquet.ParquetFile(file) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=_AT_ONCE))
            for number, values in enumerate(itertools.chain.from_iterable(batches), 1):
                yield Row(values, file, number)
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise DataError(f"is no Parquet file ({error!s:.200})", [file]) from error


def _text(file: Path) -> Iterator[Row]:
    """A row; of a file with a long text one for each part of it."""
    parts = itertools.chain(parts_of(file, _LONG), [""])
    before, text = "", next(parts)
    if text.lstrip()[:1] in ("[", "{") and (ending := _ending_of(text)):
        raise DataError(f"holds rows of JSON, not text; name it with the ending {ending}", [file])
    if not text:
        yield Row({"text": ""}, file, 1)
    for part in parts:
        yield Row({"text": text}, file, 1, before=before, after=part[:_BESIDE])
        before, text = text[-_BESIDE:], part


def _ending_of(text: str) -> str:
    """What JSON that holds objects should be called."""
    for ending, part in ((".json", text), (".jsonl", text.lstrip().partition("\n")[0])):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            return ending
    return ""


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _text,
    ".md": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
"""By ending."""
