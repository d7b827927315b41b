"""Rows of data that are at fault, told all together."""

from __future__ import annotations

from collections.abc import Sequence

from adapterkit.errors import AdapterKitError, RowError

_TOLD = 10


def joined(errors: Sequence[RowError]) -> RowError:
    """Several as one."""
    first = errors[0]
    if len(errors) == 1:
        return first
    found = RowError.__new__(RowError)
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
        self._found = error if self._found is None else joined([self._found, error])

    def check(self) -> None:
        """Raises what there is.

        Raises:
            RowError: A row is at fault.
        """
        if self._found is not None:
            raise self._found
