"""Rows of data that are at fault, told all together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapterkit.errors import AdapterKitError, DataError

_TOLD = 10


class RowError(DataError):
    """One row of a file cannot be used, or several cannot.

    Args:
        file: Where it is.
        number: The how manieth it is there.
        reason: What is wrong with it.

    Attributes:
        count: How many rows there are at fault.
        lines: The first of them, one each: file, row and reason.
    """

    def __init__(self, file: Path, number: int, reason: str) -> None:
        super().__init__(f"row {number} {reason}", [file])
        self.count, self.lines = 1, [f"{file}: row {number} {reason}"]

    @classmethod
    def of(cls, errors: Sequence[RowError]) -> RowError:
        """Several as one."""
        first = errors[0]
        if len(errors) == 1:
            return first
        found = cls.__new__(cls)
        found.count = sum(one.count for one in errors)
        found.lines = [line for one in errors for line in one.lines][:_TOLD]
        found.files = list(dict.fromkeys(file for one in errors for file in one.files))
        found.reason = f"{found.count} rows cannot be used"
        more = found.count - len(found.lines)
        told = [*found.lines, *([f"and {more} more"] if more else [])]
        AdapterKitError.__init__(found, "\n  ".join([f"{found.reason}:", *told]))
        return found


class Faults:
    """Takes up rows at fault while others are read on."""

    def __init__(self) -> None:
        self._found: RowError | None = None

    def add(self, error: RowError) -> None:
        """One more; of many the first are kept."""
        self._found = error if self._found is None else RowError.of([self._found, error])

    def check(self) -> None:
        """Raises what there is.

        Raises:
            RowError: A row is at fault.
        """
        if self._found is not None:
            raise self._found
