"""Patterns of PEFT's configs: regular expressions of the end of a module's path, matched in bounded time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapterkit.errors import InvalidHeaderError, shown
from adapterkit.formats.bounded_regex import MAX_LENGTH, MAX_STEPS, BoundedRegex, PatternError

_MOST = 20_000
_PLAIN = re.compile(r"\^?[\w.\-/]*\$?")


class Patterns:
    """Patterns with what they stand for; the first that matches counts.

    Args:
        values: Pattern -> value, in the file's order.
        where, key: What errors name.

    Raises:
        InvalidHeaderError: A pattern is no regular expression, or one whose time is not bounded.
    """

    def __init__(self, values: Mapping[str, Any], where: object, key: str) -> None:
        if len(values) > _MOST:
            raise InvalidHeaderError(f"has {len(values):,} patterns; the limit is {_MOST:,}", where, key)
        self._values: list[tuple[_Pattern, Any]] = []
        steps = 0
        for text, value in values.items():
            pattern = _Pattern(text, where, key)
            self._values.append((pattern, value))
            if (steps := steps + pattern.size) > 2 * MAX_STEPS:
                raise InvalidHeaderError(f"has patterns of more than {2 * MAX_STEPS:,} steps", where, key)

    def __len__(self) -> int:
        return len(self._values)

    def at(self, path: str) -> Any:
        """The value for a module's path; None where no pattern is its end, or all of it."""
        return next((value for pattern, value in self._values if pattern.is_end(path)), None)


class _Pattern:
    """One pattern. Those without repeats are compared by Python's own `re`, which has nothing to try again then."""

    def __init__(self, pattern: str, where: object, key: str) -> None:
        self._last = ""
        self._bounded: BoundedRegex | None = None
        try:
            if _PLAIN.fullmatch(pattern) and len(pattern) <= MAX_LENGTH:
                self._last = pattern.rstrip("$").rpartition(".")[2].removeprefix("^")
                self._plain = re.compile(rf"(?:.*\.)?(?:{pattern})$")
            else:
                BoundedRegex(pattern)
                self._bounded = BoundedRegex(rf"(?:.*\.)?(?:{pattern})")
        except PatternError as error:
            raise InvalidHeaderError(f"{shown(pattern)} {error}", where, key) from error

    @property
    def size(self) -> int:
        return 0 if self._bounded is None else self._bounded.size

    def is_end(self, path: str) -> bool:
        """Whether it is all of a path, or of what stands behind one of its dots."""
        if self._bounded is not None:
            return self._bounded.fullmatch(path)
        return path.endswith(self._last) and self._plain.match(path) is not None


def is_whole(pattern: str, path: str, where: object, key: str) -> bool:
    """Whether a pattern is all of a path.

    Raises:
        InvalidHeaderError: See `Patterns`.
    """
    try:
        return BoundedRegex(pattern).fullmatch(path)
    except PatternError as error:
        raise InvalidHeaderError(f"{shown(pattern)} {error}", where, key) from error
