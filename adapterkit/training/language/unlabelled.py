"""Rows of texts whose classes are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from adapterkit.errors import RowError
from adapterkit.training.data_files import Notes
from adapterkit.training.language.labelled import UNLABELLED
from adapterkit.training.language.layouts import Columns, read_as
from adapterkit.training.language.rows import Row, row_files

Asked = tuple[str, "str | None"]
"""A text, and the one that belongs to it, where there is one."""


def unlabelled_rows(inputs: Sequence[Path], columns: Columns) -> Iterator[tuple[Asked | RowError, Row]]:
    """What the rows of files, and of the files in folders, say, or what is wrong with them, one at a time.

    Raises:
        DataError: There is no such file, or its columns are none that are read.
    """
    for file in _files_of(inputs):
        read = read_as(file, UNLABELLED, columns)
        for said, row in read.tried() if read is not None else ():
            if not row.before:  # the limit of tokens is reached in the first part of a long text
                yield said, row


def _files_of(inputs: Sequence[Path]) -> list[Path]:
    """What else is in folders is told in a warning."""
    found: list[Path] = []
    for path in inputs:
        notes = Notes(path)
        found += row_files(path, notes)
        notes.warn()
    return found
