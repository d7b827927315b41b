"""What a user may say that should act, and the selection that it means."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from adapterkit.composition import Composition, Expression, Split, names_of, share_of
from adapterkit.errors import ConfigError, RoutingError, UnknownNameError
from adapterkit.points import InjectionPoint, TokensLayout, WeightLayout
from adapterkit.selection import PerPoint, Selection, Weight
from adapterkit.selectors import Selector
from adapterkit.state import Attached

WeightFunction = Callable[[InjectionPoint, int], float]
"""The weight at a point and a step; see `Adapters.at_step`."""

Asked = float | Mapping[str, float] | WeightFunction
"""A weight as a user says it: a number, a number for each selector (the first that matches), or a function."""

Choice = Expression | Sequence[Expression] | Mapping[Expression, Asked] | None
"""A name or an expression, several, several with weights, or nothing."""


def to_selection(choice: Choice, adapters: Mapping[str, Attached], step: int = 0) -> Selection:
    """The selection that a choice among these adapters means.

    Raises:
        UnknownNameError: A name is none of theirs.
        ConfigError: A weight is not a finite number, or negative where it multiplies attention.
        RoutingError: `Split` names an adapter that acts where there is no axis of tokens.
    """
    if choice is None:
        return Selection()
    asked = _asked(choice)
    weights: dict[Expression, Weight] = {}
    for expression, weight in asked.items():
        names = _checked_names(expression, adapters)
        _check_splits(expression, adapters)
        _check_shares(expression, adapters)
        weights[expression] = _weight(expression, weight, [adapters[name] for name in names], step)
    _check_repeats(asked, adapters)
    return Selection(weights, asked)


def to_routes(routes: Sequence[Expression | None], adapters: Mapping[str, Attached]) -> Selection:
    """The selection that gives every row of a batch its own adapter.

    Args:
        routes: One name or expression for each row; None is the base.
        adapters: What there is to name.

    Raises:
        UnknownNameError: A name is none of theirs.
        ConfigError: `routes` is no sequence of names.
        RoutingError: An adapter acts where one weight serves the whole batch.
    """
    if isinstance(routes, (str, Composition)) or not isinstance(routes, Sequence) or not routes:
        raise ConfigError([f"expected one name or None for each sample of the batch, not {routes!r}"], "routed()")
    expressions = list(dict.fromkeys(one for one in routes if one is not None))
    for expression in expressions:
        for name in _checked_names(expression, adapters):
            if reason := _no_rows(adapters[name]):
                raise RoutingError(f"{name!r} cannot be routed: {reason}")
        _check_splits(expression, adapters)
        _check_shares(expression, adapters)
    return Selection({one: torch.tensor([float(route == one) for route in routes]) for one in expressions})


def check_names(names: Iterable[object], adapters: Mapping[str, Attached]) -> None:
    """Raises UnknownNameError for a name that is no adapter's."""
    for name in names:
        if name not in adapters:
            raise UnknownNameError("adapter", str(name), adapters, "" if adapters else "Nothing is attached.")


def _checked_names(expression: object, adapters: Mapping[str, Attached]) -> tuple[str, ...]:
    if not isinstance(expression, (str, Composition)):
        raise UnknownNameError("adapter", str(expression), adapters, "" if adapters else "Nothing is attached.")
    names = names_of(expression)
    check_names(names, adapters)
    return names


def _no_rows(adapter: Attached) -> str | None:
    """Why the rows of a batch cannot have this adapter each for itself, or None."""
    read = [p for p in adapter.points.values() if isinstance(p.layout, WeightLayout) and p.layout.access == "read"]
    if read:
        return f"the model reads the weight at {read[0].id} once for the whole batch"
    unmasked = [p for p in adapter.points.values() if isinstance(p.layout, TokensLayout) and p.layout.lengthens]
    unmasked = [p for p in unmasked if not p.layout.masked]  # type: ignore[union-attr]
    if unmasked:
        return f"at {unmasked[0].id} there is no mask by which other rows would not see its positions"
    points = adapter.points
    fixed = [key for key, one in adapter.modules.items() if not one.scalable and points[key].kind != "tokens"]
    return f"at {fixed[0]} it replaces the base, which other rows would need" if fixed else None


def _check_splits(expression: Expression, adapters: Mapping[str, Attached]) -> None:
    if isinstance(expression, str):
        return
    for part in expression.parts:
        _check_splits(part, adapters)
    if not isinstance(expression, Split):
        return
    for name in expression.names:
        for point in adapters[name].points.values():
            if reason := _no_tokens(point):
                raise RoutingError(f"Split cannot give {name!r} a span of tokens: {reason}")


def _check_shares(expression: Expression, adapters: Mapping[str, Attached]) -> None:
    """What acts or does not must have the whole weight in an expression, and once."""
    for name in names_of(expression):
        fixed = [key for key, module in adapters[name].modules.items() if not module.scalable]
        share = share_of(name, expression)
        if fixed and share != 1:
            told = f"{expression!r} has {name!r} with weight {share:g}, but it acts or does not at {fixed[0]}"
            raise ConfigError([f"{told}: its weight must be 1"], "activate()")


def _check_repeats(expressions: Iterable[Expression], adapters: Mapping[str, Attached]) -> None:
    """Nor may it be in two expressions."""
    counts = collections.Counter(name for expression in expressions for name in names_of(expression))
    for name, count in counts.items():
        fixed = [key for key, module in adapters[name].modules.items() if not module.scalable]
        if fixed and count > 1:
            raise ConfigError(
                [f"{name!r} is in {count} expressions, but it acts or does not at {fixed[0]}: name it once"],
                "activate()",
            )


def _no_tokens(point: InjectionPoint) -> str | None:
    layout = point.layout
    if point.kind not in ("weight", "output"):
        return f"at {point.id} it acts on the whole sequence"
    if isinstance(layout, WeightLayout) and (layout.kernel or layout.access == "read"):
        return f"there is no axis of tokens at {point.id}"
    return None


def _weight(expression: Expression, asked: object, attached: Sequence[Attached], step: int) -> Weight:
    """The weight of an expression, for each point where it is not one for all."""
    if not callable(asked) and not isinstance(asked, Mapping):
        _check_weight(expression, asked, attached, None)
        return float(asked)  # type: ignore[arg-type]
    points = {key: point for one in attached for key, point in one.points.items()}
    if callable(asked):
        found: dict[str, Any] = {key: asked(point, step) for key, point in points.items()}
    else:
        found = _by_selector(expression, asked, points)
    for key, weight in found.items():
        _check_weight(expression, weight, attached, points[key])
    return PerPoint(found)


def _by_selector(
    expression: Expression, asked: Mapping[str, float], points: Mapping[str, InjectionPoint]
) -> dict[str, float]:
    """Point id -> weight of the first selector that matches; 0 where none does."""
    selectors = [(Selector(text), weight) for text, weight in asked.items()]
    idle = [s.text for s, _ in selectors if not any(s.matches(point) for point in points.values())]
    if idle:
        roles = ", ".join(sorted({point.role for point in points.values()}))
        raise ConfigError([f"{text!r} matches no point of {expression!r} (roles: {roles})" for text in idle], "weights")
    return {
        key: next((weight for selector, weight in selectors if selector.matches(point)), 0.0)
        for key, point in points.items()
    }


def _check_weight(
    expression: Expression, weight: object, attached: Sequence[Attached], at: InjectionPoint | None
) -> None:
    where = "" if at is None else f" at {at.id}"
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        expected = "a finite number, a number for each selector, or a function of (point, step)"
        raise ConfigError([f"the weight of {expression!r}{where} must be {expected}, not {weight!r}"], "weights")
    kinds = {point.kind for one in attached for point in one.points.values()} if at is None else {at.kind}
    if weight < 0 and "attention" in kinds:
        told = f"{expression!r} multiplies attention{where}, so its weight must not be negative, but it is {weight!r}"
        raise ConfigError([told], "weights")
    modules = [(key, m) for one in attached for key, m in one.modules.items() if at is None or key == at.id]
    fixed = [key for key, module in modules if not module.scalable]
    if fixed and weight not in (0, 1):
        raise ConfigError(
            [f"{expression!r} acts or does not at {fixed[0]}: its weight must be 1, not {weight!r}"], "weights"
        )


def _asked(choice: Expression | Sequence[Expression] | Mapping[Expression, Asked]) -> Mapping[Expression, Asked]:
    if isinstance(choice, (str, Composition)):
        return {choice: 1.0}
    if isinstance(choice, Mapping):
        return choice
    if not isinstance(choice, Iterable):
        raise ConfigError(
            [f"expected a name, names, a mapping of names to weights, or None, not {choice!r}"], "activate()"
        )
    names = list(choice)
    if repeated := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise ConfigError(
            [f"{name!r} is named twice; give it a weight: {{{name!r}: 2.0}}" for name in repeated], "activate()"
        )
    return dict.fromkeys(names, 1.0)
