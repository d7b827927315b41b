"""Selectors: a small language that names injection points by role and tag. Torch-free.

    attn.{q,v}                  roles, with globs and braces
    attn.* mlp.*@layer>=8       alternatives, separated by spaces; tag filters after @, joined by commas
    @component=text_encoder     any role, filtered
    linear@stage=up             a preset (attention, linear, all), filtered
    path:blocks.*.attn.qkv      module paths

No regular expressions: a selector may come from a file, and a glob cannot be made to run for ever.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from adapterkit.errors import SelectorError, TargetNotFoundError, near_matches
from adapterkit.points import InjectionPoint, Tag

_MAX_LENGTH = 2000
_MAX_ALTERNATIVES = 200
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
_OUTSIDE_PRESETS = ("head", "head.*", "embed.*", "moe.router", "norm", "hidden")


def is_inner(point: InjectionPoint) -> bool:
    """Whether a preset may reach the point: neither head, embedding, router, norm nor hidden state."""
    return not any(fnmatchcase(point.role, pattern) for pattern in _OUTSIDE_PRESETS)


PRESETS: dict[str, Callable[[InjectionPoint], bool]] = {
    "attention": lambda p: fnmatchcase(p.role, "attn.*") or fnmatchcase(p.role, "cross.*"),
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
            return fnmatchcase(actual, self.value)
        if self.symbol == "!=":
            return not fnmatchcase(actual, self.value)
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
        if self.pattern in PRESETS:
            return PRESETS[self.pattern](point)
        if self.pattern.startswith("path:"):
            pattern = self.pattern[len("path:") :]
            return fnmatchcase(point.path, pattern) or fnmatchcase(point.full_path, pattern)
        return fnmatchcase(point.role, self.pattern)


class Selector:
    """A parsed selector.

    Args:
        text: See the module's description.

    Raises:
        SelectorError: The text cannot be parsed; the message shows the part at fault.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text.strip():  # pyright: ignore[reportUnnecessaryIsInstance] - text of users
            raise SelectorError(f"a selector must be a non-empty string, not {text!r}; for example 'attn.q attn.v'")
        if len(text) > _MAX_LENGTH:
            raise SelectorError(f"selector of {len(text)} characters; at most {_MAX_LENGTH} are allowed")
        self.text = text
        words = list(itertools.chain.from_iterable(_expand(word) for word in text.split()))
        if len(words) > _MAX_ALTERNATIVES:
            raise SelectorError(
                f"selector {text[:60]!r} expands to {len(words)} alternatives; at most {_MAX_ALTERNATIVES}"
            )
        self.alternatives = tuple(_parse(word) for word in words)

    def matches(self, point: InjectionPoint) -> bool:
        """Whether any alternative accepts the point."""
        return any(accepts(point) for accepts in self.alternatives)

    def select(self, points: Iterable[InjectionPoint], model: str = "the model") -> list[InjectionPoint]:
        """The matching points, in model order. Every alternative must match something.

        Raises:
            TargetNotFoundError: An alternative matches nothing; lists the roles that are near.
            SelectorError: A filter compares a numbered tag with something that is no number.
        """
        points = list(points)
        for alternative in self.alternatives:
            if not any(map(alternative, points)):
                raise TargetNotFoundError(self._nothing(alternative, points, model))
        return [point for point in points if self.matches(point)]

    def _nothing(self, alternative: _Alternative, points: list[InjectionPoint], model: str) -> str:
        named = [point for point in points if _Alternative(alternative.pattern, ())(point)]
        head = f"no injection point of {model} matches {self.text!r}"
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
        return f"Selector({self.text!r})"


def _values_of(tag: str, points: Sequence[InjectionPoint]) -> str:
    """Which values a tag has at these points, as a sentence."""
    values = sorted({str(point.tags[tag]) for point in points if tag in point.tags})
    if values:
        return f"{tag} is one of {', '.join(values[:12])}"
    return f"they have no tag {tag!r}, only {', '.join(sorted({key for point in points for key in point.tags}))}"


def _expand(word: str) -> list[str]:
    """`attn.{q,v}` -> `attn.q`, `attn.v`; braces may repeat, and may not nest."""
    parts = re.split(r"\{([^{}]*)\}", word)
    if any(brace in part for part in parts for brace in "{}"):
        raise SelectorError(f"unbalanced or nested braces in {word!r}")
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MAX_ALTERNATIVES:
        raise SelectorError(f"{word[:60]!r} expands to {count} alternatives; at most {_MAX_ALTERNATIVES} are allowed")
    return ["".join(combination) for combination in itertools.product(*choices)]


def _parse(word: str) -> _Alternative:
    pattern, _, tail = word.partition("@")
    filters: list[_Filter] = []
    for text in tail.split(",") if tail else []:
        match = _FILTER.fullmatch(text)
        if match is None:
            raise SelectorError(
                f"cannot read the tag filter {text!r} in {word!r}; write for example @layer>=8 or @stage=up"
            )
        filters.append(_Filter(*match.groups()))
    if "@" in word and not tail:
        raise SelectorError(f"{word!r} ends in '@'; a tag filter such as 'layer>=8' must follow")
    return _Alternative(pattern or "*", tuple(filters))
