"""Selectors: a small language that names injection points by role and tag. Torch-free.

    attn.{q,v}                  roles, with globs and braces
    attn.* mlp.*@layer>=8       alternatives, separated by spaces; tag filters after @, joined by commas
    @component=text_encoder     any role, filtered
    linear@stage=up             a preset (attention, linear, all), filtered
    path:blocks.*.attn.qkv      module paths

No regular expressions: a selector may come from a file, and a glob cannot be made to run for ever. Names of one role or
path are looked up, so that thousands of them cost what one costs; globs are tried one by one, so there may be fewer.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from adapterkit.errors import SelectorError, TargetNotFoundError, near_matches, shown
from adapterkit.points import InjectionPoint, Tag

Value = TypeVar("Value")
Default = TypeVar("Default")

_MAX_LENGTH = 1 << 20
_MAX_WORD = 2000
_MAX_ALTERNATIVES = 1 << 16
_MAX_EXPANDED = 1000
"""Alternatives that the braces of one word stand for."""
_MAX_BRACES = 1 << 13
"""Alternatives that braces add to those that are written: of a selector, or of all in a table."""
_MAX_GLOBS = 1000
_OPERATORS: dict[str, Callable[[Tag, Tag], bool]] = {
    ">=": operator.ge,  # type: ignore[dict-item]
    "<=": operator.le,  # type: ignore[dict-item]
    "!=": operator.ne,
    "=": operator.eq,
    ">": operator.gt,  # type: ignore[dict-item]
    "<": operator.lt,  # type: ignore[dict-item]
}
_FILTER = re.compile(r"([a-z_]+)(>=|<=|!=|=|>|<)(.+)")

# Roles that no preset may reach: vocabulary, classifier and the choice of experts are never what "all" is meant to say.
_OUTSIDE_PRESETS = ("head", "head.*", "embed.*", "moe.router", "norm", "hidden", "fused.*")
_WHOLE = "fused."  # a layer whose parts are points too: only who names it means it


def is_inner(point: InjectionPoint) -> bool:
    """Whether a preset may reach the point: neither head, embedding, router, norm nor hidden state."""
    return _is_inner_role(point.role)


@functools.lru_cache(maxsize=4096)
def _is_inner_role(role: str) -> bool:
    return not any(fnmatch.fnmatchcase(role, pattern) for pattern in _OUTSIDE_PRESETS)


PRESETS: dict[str, Callable[[InjectionPoint], bool]] = {
    "attention": lambda p: fnmatch.fnmatchcase(p.role, "attn.*") or fnmatch.fnmatchcase(p.role, "cross.*"),
    "linear": lambda p: p.is_linear and is_inner(p),
    "all": is_inner,
}


@dataclass(frozen=True)
class _Filter:
    tag: str
    symbol: str
    value: str

    def __call__(self, point: InjectionPoint) -> bool:
        actual = point.tags.get(self.tag)
        if actual is None:
            return self.symbol == "!="
        if isinstance(actual, int):
            return _OPERATORS[self.symbol](actual, self._number())
        if self.symbol == "=":
            return fnmatch.fnmatchcase(actual, self.value)
        if self.symbol == "!=":
            return not fnmatch.fnmatchcase(actual, self.value)
        return _OPERATORS[self.symbol](actual, self.value)

    def _number(self) -> int:
        try:
            return int(self.value)
        except ValueError:
            raise SelectorError(f"tag {self.tag!r} is a number here, so {self.value!r} must be one") from None


@dataclass(frozen=True)
class _Alternative:
    pattern: str
    filters: tuple[_Filter, ...]

    def __call__(self, point: InjectionPoint) -> bool:
        return self._names(point) and all(accepts(point) for accepts in self.filters)

    def _names(self, point: InjectionPoint) -> bool:
        if point.role.startswith(_WHOLE) and not self.pattern.startswith(_WHOLE.rstrip(".")):
            return False
        if self.pattern in PRESETS:
            return PRESETS[self.pattern](point)
        if self.pattern.startswith("path:"):
            return any(map(self._expression.match, (point.path, point.full_path)))
        return self._expression.match(point.role) is not None

    @functools.cached_property
    def _expression(self) -> re.Pattern[str]:
        return re.compile(fnmatch.translate(self.pattern.removeprefix("path:")))

    @property
    def literal(self) -> str | None:
        """The one role, or `path:` with the one path, that it can name; None where it can name several."""
        return None if self.pattern in PRESETS or any(sign in self.pattern for sign in "*?[") else self.pattern


class _Lookup:
    """Many alternatives, of which each point is held against those that can name it."""

    def __init__(self, alternatives: Sequence[_Alternative]) -> None:
        self._alternatives = alternatives
        self._globs: list[int] = []
        self._literal: dict[str, list[int]] = {}
        for number, alternative in enumerate(alternatives):
            literal = alternative.literal
            (self._globs if literal is None else self._literal.setdefault(literal, [])).append(number)
        if len(self._globs) > _MAX_GLOBS:
            raise SelectorError(f"{len(self._globs):,} different globs and presets; at most {_MAX_GLOBS:,}")
        self._has_paths = any(key.startswith("path:") for key in self._literal)

    def matching(self, point: InjectionPoint) -> Iterator[int]:
        """The numbers of the alternatives that accept a point, in no order."""
        keys = (point.role, f"path:{point.path}", f"path:{point.full_path}") if self._has_paths else (point.role,)
        for number in itertools.chain(self._globs, *(self._literal.get(key, ()) for key in keys)):
            if self._alternatives[number](point):
                yield number


class Selector:
    """A parsed selector.

    Args:
        text: See the module's description.

    Raises:
        SelectorError: The text cannot be parsed; the message shows the part at fault.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text.strip():  # pyright: ignore[reportUnnecessaryIsInstance] - text of users
            raise SelectorError(
                f"a selector must be a non-empty string, not {shown(text)}; for example 'attn.q attn.v'"
            )
        self.text = text
        self.alternatives = (_cached if len(text) <= _MAX_WORD else _alternatives)(text)
        self._lookup = _Lookup(self.alternatives)

    def matches(self, point: InjectionPoint) -> bool:
        """Whether any alternative accepts the point."""
        return next(self._lookup.matching(point), None) is not None

    def select(self, points: Iterable[InjectionPoint], model: str = "the model") -> list[InjectionPoint]:
        """The matching points, in model order. Every alternative must match something.

        Raises:
            TargetNotFoundError: An alternative matches nothing; lists the roles that are near.
            SelectorError: A filter compares a numbered tag with something that is no number.
        """
        points, used = list(points), set[int]()
        chosen: list[InjectionPoint] = []
        for point in points:
            if matching := set(self._lookup.matching(point)):
                used |= matching
                chosen.append(point)
        for number, alternative in enumerate(self.alternatives):
            if number not in used:
                raise TargetNotFoundError(self._nothing(alternative, points, model))
        return chosen

    def _nothing(self, alternative: _Alternative, points: list[InjectionPoint], model: str) -> str:
        named = [point for point in points if _Alternative(alternative.pattern, ())(point)]
        head = f"no injection point of {model} matches {shown(self.text)}"
        if named:
            found = "; ".join(_values_of(item.tag, named) for item in alternative.filters)
            return f"{head}: the role exists, but not with those tags ({found})."
        if alternative.pattern in PRESETS:
            roles = sorted({point.role for point in points if is_inner(point)} or {point.role for point in points})
            return (
                f"{head}: the preset {alternative.pattern!r} selects nothing here. Name roles instead, such as "
                f"targets={' '.join(roles[:3])!r}; those that there are: {', '.join(roles[:20]) or 'none'}"
            )
        is_path = alternative.pattern.startswith("path:")
        names = sorted({point.path if is_path else point.role for point in points})
        wanted = alternative.pattern.removeprefix("path:")
        close = near_matches(wanted, names) or names[:20]
        return (
            f"{head}: {wanted!r} is unknown here. Closest: {', '.join(close)}. List all with adapterkit.points(model)."
        )

    def __repr__(self) -> str:
        return f"Selector({shown(self.text)})"


class Table(Generic[Value]):
    """Selector -> value. Of several selectors that match a point, the last one's value is the point's.

    Args:
        values: See above.

    Raises:
        SelectorError: A selector cannot be parsed.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        each: list[tuple[_Alternative, ...]] = []
        braces = 0
        for text in values:
            each.append(Selector(text).alternatives)
            braces += len(each[-1]) - len({*text.split()})
            _check_braces(braces, text)
        self._texts, self._values = [*values], [*values.values()]
        self._owner = [number for number, own in enumerate(each) for _ in own]
        self._lookup = _Lookup([alternative for own in each for alternative in own])

    def at(self, point: InjectionPoint, otherwise: Default) -> Value | Default:
        """The value at a point."""
        if not self._texts:
            return otherwise
        last = max((self._owner[number] for number in self._lookup.matching(point)), default=None)
        return otherwise if last is None else self._values[last]

    def idle(self, points: Iterable[InjectionPoint]) -> list[str]:
        """The selectors that match none of these points."""
        if not self._texts:
            return []
        used = {self._owner[number] for point in points for number in self._lookup.matching(point)}
        return [text for number, text in enumerate(self._texts) if number not in used]


@functools.lru_cache(maxsize=256)
def _cached(text: str) -> tuple[_Alternative, ...]:
    return _alternatives(text)


def _alternatives(text: str) -> tuple[_Alternative, ...]:
    """What a selector's text says, each once."""
    if len(text) > _MAX_LENGTH:
        raise SelectorError(f"selector of {len(text):,} characters; at most {_MAX_LENGTH:,} are allowed")
    words: dict[str, None] = {}
    braces = 0
    for word in dict.fromkeys(text.split()):
        expanded = _expand(word)
        words |= dict.fromkeys(expanded)
        braces += len(expanded) - 1
        _check_braces(braces, text)
        if len(words) > _MAX_ALTERNATIVES:
            raise SelectorError(f"selector {shown(text)} expands to more than {_MAX_ALTERNATIVES:,} alternatives")
    return tuple(_parse(word) for word in words)


def _check_braces(count: int, text: str) -> None:
    if count > _MAX_BRACES:
        raise SelectorError(f"with {shown(text)}, braces stand for more than {_MAX_BRACES:,} alternatives")


def _values_of(tag: str, points: Sequence[InjectionPoint]) -> str:
    """Which values a tag has at these points, as a sentence."""
    values = sorted({str(point.tags[tag]) for point in points if tag in point.tags})
    if values:
        return f"{tag} is one of {', '.join(values[:12])}"
    return f"they have no tag {tag!r}, only {', '.join(sorted({key for point in points for key in point.tags}))}"


def _expand(word: str) -> list[str]:
    """`attn.{q,v}` -> `attn.q`, `attn.v`; braces may repeat, and may not nest."""
    if len(word) > _MAX_WORD:
        raise SelectorError(
            f"{word[:60]!r}... is a word of {len(word):,} characters; at most {_MAX_WORD:,} are allowed"
        )
    parts = re.split(r"\{([^{}]*)\}", word)
    if any(brace in part for part in parts for brace in "{}"):
        raise SelectorError(f"unbalanced or nested braces in {shown(word)}")
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MAX_EXPANDED:
        raise SelectorError(f"{word[:60]!r} expands to {count:,} alternatives; at most {_MAX_EXPANDED:,} are allowed")
    return ["".join(combination) for combination in itertools.product(*choices)]


def _parse(word: str) -> _Alternative:
    pattern, sign, tail = word.partition("@")
    return _Alternative(pattern or "*", _filters(tail) if sign else ())


@functools.lru_cache(maxsize=256)
def _filters(tail: str) -> tuple[_Filter, ...]:
    """What follows the `@` of a word."""
    filters: list[_Filter] = []
    for text in tail.split(","):
        match = _FILTER.fullmatch(text)
        if match is None:
            raise SelectorError(
                f"cannot read the tag filter {shown(text)} in {shown(f'@{tail}')}; write such as @layer>=8 or @stage=up"
            )
        filters.append(_Filter(*match.groups()))
    return tuple(filters)
