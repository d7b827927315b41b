"""Patterns of PEFT's configs: regular expressions of the end of a module's path, matched in bounded time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapterkit.errors import InvalidHeaderError, shown

_MAX_LENGTH = 500
_LITERAL = re.compile(r"\^?[\w.\-/]*\$?")


class Patterns:
    """Patterns with what they stand for; the first that matches counts.

    Args:
        values: Pattern -> value, in the file's order.
        where, key: What errors name.

    Raises:
        InvalidHeaderError: A pattern is no regular expression, or one whose time is not bounded.
    """

    def __init__(self, values: Mapping[str, Any], where: object, key: str) -> None:
        self._values = [(_compiled(pattern, where, key), value) for pattern, value in values.items()]

    def __len__(self) -> int:
        return len(self._values)

    def at(self, path: str) -> Any:
        """The value for a module's path; None where no pattern matches."""
        return next((value for pattern, value in self._values if pattern.match(path)), None)


def _compiled(pattern: str, where: object, key: str) -> re.Pattern[str]:
    if len(pattern) > _MAX_LENGTH or not _LITERAL.fullmatch(pattern):
        raise InvalidHeaderError(f"{shown(pattern)} is no pattern that is run", where, key)
    return re.compile(rf"(.*\.)?({pattern})$")
