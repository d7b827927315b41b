"""Regular expressions from strangers, matched in time that grows with length alone: all ways at once, none tried again.

Literals, `.`, classes, groups, `|`, anchors and repeats are known; what looks back or around is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

MAX_LENGTH, MAX_STEPS = 500, 2000
_MOST_REPEATS, _DEEPEST = 64, 32
_ESCAPED = {"d": r"\d", "D": r"\D", "w": r"\w", "W": r"\W", "s": r"\s", "S": r"\S"}
_SPECIAL = frozenset("*+?|)")

Accepts = Callable[[str], bool]


class PatternError(ValueError):
    """It is no regular expression, or has what is not known here. Callers add where it stands."""


@dataclass
class _State:
    """What may come next: a character and another state, or states without one, where an anchor is met."""

    accepts: Accepts | None = None
    anchor: str = ""
    then: list[int] = field(default_factory=list)


class BoundedRegex:
    """One pattern.

    Args:
        pattern: As Python's `re` reads it.

    Raises:
        PatternError: It cannot be read, or is too long.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_LENGTH:
            raise PatternError(f"has {len(pattern)} characters; the limit is {MAX_LENGTH}")
        self._states: list[_State] = []
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        parser = _Parser(pattern, self._states)
        self._start, self._end = parser.whole()

    @property
    def size(self) -> int:
        """How many steps a character can take."""
        return len(self._states)

    def fullmatch(self, text: str) -> bool:
        """Whether it is all of a text."""
        now = self._closed({self._start}, at_start=True, at_end=not text)
        for place, character in enumerate(text):
            last = place == len(text) - 1
            key = (now, f"{character}{last:d}")
            if key not in self._steps:
                moved = {to for one in now for to in self._moves(one, character)}
                self._steps[key] = self._closed(moved, at_start=False, at_end=last)
            now = self._steps[key]
        return self._end in now

    def _moves(self, state: int, character: str) -> list[int]:
        found = self._states[state]
        return found.then if found.accepts is not None and found.accepts(character) else []

    def _closed(self, states: set[int], *, at_start: bool, at_end: bool) -> frozenset[int]:
        """With all that is reached without a character."""
        seen: set[int] = set()
        left = [*states]
        while left:
            one = left.pop()
            if one in seen:
                continue
            seen.add(one)
            found = self._states[one]
            met = {"^": at_start, "$": at_end, "": True}[found.anchor]
            if found.accepts is None and met:
                left.extend(found.then)
        return frozenset(seen)


class _Parser:
    """Makes states of a pattern; a piece is its first and its last state."""

    def __init__(self, pattern: str, states: list[_State]) -> None:
        self._pattern, self._at, self._states = pattern, 0, states
        self._depth = 0

    def whole(self) -> tuple[int, int]:
        piece = self._alternatives()
        if self._at < len(self._pattern):
            raise PatternError(f"has {self._next!r} where nothing is open")
        return piece

    @property
    def _next(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _taken(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _state(self, accepts: Accepts | None = None, anchor: str = "") -> int:
        if len(self._states) >= MAX_STEPS:
            raise PatternError(f"has more than {MAX_STEPS:,} steps")
        self._states.append(_State(accepts, anchor))
        return len(self._states) - 1

    def _join(self, one: int, *others: int) -> None:
        self._states[one].then.extend(others)

    def _empty(self) -> tuple[int, int]:
        one = self._state()
        return one, one

    def _alternatives(self) -> tuple[int, int]:
        first = self._sequence()
        if self._next != "|":
            return first
        start, end = self._state(), self._state()
        self._join(start, first[0])
        self._join(first[1], end)
        while self._taken("|"):
            one = self._sequence()
            self._join(start, one[0])
            self._join(one[1], end)
        return start, end

    def _sequence(self) -> tuple[int, int]:
        found = self._empty()
        while self._next and self._next not in "|)":
            one = self._repeated()
            self._join(found[1], one[0])
            found = found[0], one[1]
        return found

    def _repeated(self) -> tuple[int, int]:
        begin = self._at
        piece = self._atom()
        after = self._at
        limits = self._limits()
        if limits is None:
            return piece
        self._taken("?")  # a lazy repeat matches the same texts
        rest = self._at
        piece = self._repeat(piece, begin, after, *limits)
        self._at = rest
        if self._limits() is not None:
            raise PatternError("repeats a repeat")
        return piece

    def _limits(self) -> tuple[int, int | None] | None:
        for sign, limits in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._taken(sign):
                return limits
        found = re.compile(r"\{(\d{1,3})?(,(\d{1,3})?)?\}").match(self._pattern, self._at)
        if found is None or not (found[1] or found[2]):
            return None
        self._at = found.end()
        least = int(found[1] or 0)
        most = least if found[2] is None else None if found[3] is None else int(found[3])
        if max(least, most or 0) > _MOST_REPEATS or (most is not None and most < least):
            raise PatternError(f"repeats up to {max(least, most or 0)} times; the limit is {_MOST_REPEATS}")
        return least, most

    def _repeat(self, piece: tuple[int, int], begin: int, after: int, least: int, most: int | None) -> tuple[int, int]:
        """A piece, which lies between two places of the pattern, as often as that."""
        start, end = self._state(), self._state()
        now, count = start, max(least, 1) if most is None else most
        for i in range(count):
            one = piece if not i else self._again(begin, after)
            self._join(now, one[0], *([end] if i >= least else []))
            now = one[1]
            if most is None and i == count - 1:
                self._join(now, one[0])
        self._join(now, end)
        return start, end

    def _again(self, begin: int, after: int) -> tuple[int, int]:
        self._at = begin
        piece = self._atom()
        if self._at != after:
            raise PatternError("cannot be read")
        return piece

    def _atom(self) -> tuple[int, int]:
        if self._taken("("):
            return self._group()
        if self._next in _SPECIAL:
            raise PatternError(f"has {self._next!r} with nothing before it")
        if self._taken("["):
            return self._one(self._class())
        character = self._next
        self._at += 1
        if character in "^$":
            state = self._state(anchor=character)
            end = self._state()
            self._join(state, end)
            return state, end
        if character == ".":
            return self._one(lambda c: c != "\n")
        if character == "\\":
            return self._one(_one_of(self._escape()))
        return self._one(lambda c: c == character)

    def _one(self, accepts: Accepts) -> tuple[int, int]:
        state, end = self._state(accepts), self._state()
        self._join(state, end)
        return state, end

    def _group(self) -> tuple[int, int]:
        if self._taken("?") and not self._taken(":"):
            name = re.compile(r"P<\w{1,50}>").match(self._pattern, self._at)
            if name is None:
                raise PatternError("looks around or back, which is not run")
            self._at = name.end()
        self._depth += 1
        if self._depth > _DEEPEST:
            raise PatternError(f"is nested deeper than {_DEEPEST}")
        piece = self._alternatives()
        self._depth -= 1
        if not self._taken(")"):
            raise PatternError("has a group that is not closed")
        return piece

    def _escape(self) -> str:
        """What stands behind a backslash, as a piece of a class."""
        character = self._next
        self._at += 1
        if not character or (character.isalnum() and character not in _ESCAPED) or not character.isascii():
            raise PatternError(f"has an escape that is not run: \\{character}")
        return _ESCAPED.get(character, re.escape(character))

    def _class(self) -> Accepts:
        begin = self._at
        for piece in self._class_pieces():
            if piece == "]":
                break
        else:
            raise PatternError("has a class that is not closed")
        text = self._pattern[begin : self._at - 1]
        try:
            return _one_of(text)
        except re.error as error:
            raise PatternError(f"has a class that cannot be read: {error}") from None

    def _class_pieces(self) -> Iterator[str]:
        self._taken("^")
        first = True
        while self._next:
            character = self._next
            self._at += 1
            if character == "\\":
                self._escape()
                yield "\\"
            elif character == "]" and not first:
                yield "]"
                return
            else:
                yield ""
            first = False


def _one_of(text: str) -> Accepts:
    """A class of characters; what is between brackets is one of Python's, and takes one step."""
    found = re.compile(f"[{text}]")
    return lambda character: found.match(character) is not None
