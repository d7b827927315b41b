"""Expressions of adapter names: what may stand wherever a name may. Torch-free.

`Stack("a", "b")` puts b around a, `Average("a", "b")` takes the mean, `Split` gives every token span its own.
They nest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from adapterkit.errors import ConfigError, shown


class Composition:
    """Several adapters that act as one. Immutable and hashable; compared by value."""

    parts: tuple[Expression, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter's name in it, once, in order."""
        return tuple(dict.fromkeys(_names(self)))


Expression = str | Composition
"""An adapter's name, or adapters that act as one."""


@dataclass(frozen=True, init=False)
class _Sequence(Composition):
    parts: tuple[Expression, ...]

    def __init__(self, *parts: Expression) -> None:
        object.__setattr__(self, "parts", _checked(parts, type(self).__name__))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"


class Stack(_Sequence):
    """One around the other, the first innermost: what is the base for `b` in `Stack("a", "b")` has `a` in it.

    y = b(x, a(x, base)). Types whose effect is a sum do not see each other, so that their stack is their sum; a
    bottleneck takes the one's output for its input. Prefixes stand in the order [b; a; keys].
    """


class Parallel(_Sequence):
    """Side by side on the same base, their effects summed: what a list of names means, inside an expression."""


class Average(_Sequence):
    """The mean of their effects: y = base(x) + 1/n * sum_i (a_i(x, base) - base(x)). `Average(a, a)` equals `a`."""


@dataclass(frozen=True, init=False)
class Split(Composition):
    """Every adapter on its own span of the tokens, as `Split({"a": (0, 16), "b": (16, None)})`.

    Spans are positions of the sequence that a forward is given, like a slice's: negative ones count from its end, and
    with a cache each later forward is a sequence of its own. Between the spans the base acts.

    Attributes:
        spans: Expression -> (start, stop); they may not overlap.
    """

    parts: tuple[Expression, ...]
    bounds: tuple[tuple[int, int | None], ...]
    spans: Mapping[Expression, tuple[int, int | None]] = field(compare=False, repr=False)

    def __init__(self, spans: Mapping[Expression, tuple[int, int | None]]) -> None:
        if not isinstance(spans, Mapping):
            raise ConfigError([f"expected a mapping of names to (start, stop), not {shown(spans)}"], "Split")
        object.__setattr__(self, "parts", _checked(tuple(spans), "Split"))
        object.__setattr__(self, "bounds", tuple(_bounds(name, span) for name, span in spans.items()))
        _check_apart(self.bounds)
        object.__setattr__(self, "spans", MappingProxyType(dict(zip(self.parts, self.bounds, strict=True))))

    def __reduce__(self) -> tuple[type[Split], tuple[dict[Expression, tuple[int, int | None]]]]:
        return Split, (dict(self.spans),)

    def __repr__(self) -> str:
        return f"Split({dict(self.spans)!r})"


def names_of(expression: Expression) -> tuple[str, ...]:
    """Every adapter's name in an expression."""
    return (expression,) if isinstance(expression, str) else expression.names


def share_of(name: str, expression: Expression) -> float:
    """The weight that an adapter has in an expression, all its places together."""
    if isinstance(expression, str):
        return float(expression == name)
    total = sum(share_of(name, part) for part in expression.parts)
    return total / len(expression.parts) if isinstance(expression, Average) else total


def _names(composition: Composition) -> Iterator[str]:
    for part in composition.parts:
        yield from names_of(part)


def _checked(parts: tuple[object, ...], what: str) -> tuple[Expression, ...]:
    if not parts:
        raise ConfigError(["expected at least one adapter's name"], what)
    problems = [
        f"expected names of adapters, not {shown(part)}" for part in parts if not isinstance(part, (str, Composition))
    ]
    if problems:
        raise ConfigError(problems, what)
    return parts  # type: ignore[return-value]


def _bounds(name: object, span: object) -> tuple[int, int | None]:
    match span:
        case (int(start), int() | None as stop) if not isinstance(start, bool) and not isinstance(stop, bool):
            return start, stop
    told = f"the span of {shown(name)} must be (start, stop) with whole numbers or None, not {shown(span)}"
    raise ConfigError([told], "Split")


def _check_apart(bounds: tuple[tuple[int, int | None], ...]) -> None:
    """Raises ConfigError for spans that are empty or overlap; those counted from different ends meet in a forward."""
    for start, stop in bounds:
        if stop is not None and (start < 0) == (stop < 0) and stop <= start:
            raise ConfigError([f"the span ({start}, {stop}) has no token"], "Split")
    for sign in (True, False):
        known = sorted((a, math.inf if b is None else b) for a, b in bounds if (a < 0) == sign)
        same = [(a, b) for a, b in known if b == math.inf or (b < 0) == sign]
        for (a, b), (c, d) in itertools.pairwise(same):
            if c < b:
                raise ConfigError([f"the spans ({a}, {b}) and ({c}, {d}) overlap"], "Split")
