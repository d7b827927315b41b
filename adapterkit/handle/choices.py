"""What a user may say that should act, and the selection that it means."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from adapterkit.composition import Composition, Expression, Split, names_of, share_of
from adapterkit.engine.selection import PerPoint, Selection, Weight
from adapterkit.errors import ConfigError, RoutingError, UnknownNameError, shown
from adapterkit.handle.facts import tokenless
from adapterkit.handle.state import Attached
from adapterkit.kernels.gates import Gates
from adapterkit.points import AttentionPoint, InjectionPoint, OutputPoint, WeightPoint
from adapterkit.selectors import Selector

WeightFunction = Callable[[InjectionPoint, int], float | torch.Tensor]
"""The weight at a point and a step; see `Adapters.at_step`."""


Asked = float | torch.Tensor | Mapping[str, float | torch.Tensor] | WeightFunction
"""A weight as a user says it: a number, a tensor [rows] or [rows, tokens] that may carry gradients, one of these for
each selector (the first that matches), or a function that gives one."""


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
        weights[expression] = _weight(expression, weight, [adapters[name] for name in names], step)
    check_together(weights, adapters)
    return Selection(weights, asked)


def to_routes(
    routes: Sequence[Expression | None], adapters: Mapping[str, Attached], copies: int | None = None
) -> Selection:
    """The selection that gives every row of a batch its own adapter.

    Args:
        routes: One name or expression for each row; None is the base.
        adapters: What there is to name.
        copies: How often a pipeline repeats the whole batch, where that is known.

    Raises:
        UnknownNameError: A name is none of theirs.
        ConfigError: `routes` is no sequence of names, or `copies` no number.
        RoutingError: An adapter acts where one weight serves the whole batch.
    """
    if isinstance(routes, (str, Composition)) or not isinstance(routes, Sequence) or not routes:
        raise ConfigError([f"expected one name or None for each sample of the batch, not {shown(routes)}"], "routed()")
    if copies is not None and (isinstance(copies, bool) or not isinstance(copies, int) or copies < 1):
        raise ConfigError([f"copies must be None or a whole number from 1, not {shown(copies)}"], "routed()")
    named = [route for route in routes if route is not None]
    for name in dict.fromkeys(name for route in named for name in _checked_names(route, adapters)):
        check_routable(name, adapters[name])
    # In the order in which they were attached: another order of the rows needs no other program of torch.compile.
    order = {name: i for i, name in enumerate(adapters)}
    expressions = sorted(dict.fromkeys(named), key=lambda one: ([order[name] for name in names_of(one)], repr(one)))
    places = {one: place for place, one in enumerate(expressions)}
    ids = [len(places) if one is None else places[one] for one in routes]
    selection = Selection.of_rows(expressions, ids, copies)
    check_together(selection.weights, adapters)
    return selection


def check_names(names: Iterable[object], adapters: Mapping[str, Attached]) -> None:
    """Raises UnknownNameError for a name that is no adapter's."""
    for name in names:
        if not isinstance(name, str) or name not in adapters:
            raise UnknownNameError("adapter", name, adapters, "" if adapters else "Nothing is attached.")


def check_context(tensors: Mapping[str, object], adapters: Mapping[str, Attached]) -> None:
    """Raises UnknownNameError or ConfigError for side inputs that no adapter reads, or that have no rows."""
    for name, value in tensors.items():
        if not any(name in one.reads for one in adapters.values()):
            read = {known for one in adapters.values() for known in one.reads}
            hint = "" if read else "No adapter on the model reads any; a type names its own in `example_context`."
            raise UnknownNameError("side input", name, read, hint)
        if not isinstance(value, torch.Tensor) or not value.ndim:
            told = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise ConfigError(
                [f"{name} must be a tensor [rows, ...], or [1, ...] for all rows, not {told}"], "context()"
            )


def _checked_names(expression: object, adapters: Mapping[str, Attached]) -> tuple[str, ...]:
    names = names_of(_checked_expression(expression))
    check_names(names, adapters)
    return names


def _checked_expression(given: object) -> Expression:
    if not isinstance(given, (str, Composition)):
        raise ConfigError([f"expected a name or an expression such as Stack('a', 'b'), not {shown(given)}"], "adapters")
    return given


def _weight(expression: Expression, asked: object, attached: Sequence[Attached], step: int) -> Weight:
    """The weight of an expression, for each point where it is not one for all."""
    if not isinstance(asked, (Mapping, torch.Tensor)) and not callable(asked):  # a plain weight walks no points
        _check_weight(expression, asked, attached, None)
        return float(asked)  # type: ignore[arg-type]
    points = {key: point for one in attached for key, point in one.points.items()}
    if isinstance(asked, torch.Tensor):
        return _gates(expression, asked, attached, [*points.values()])
    if callable(asked):
        found: dict[str, Any] = {key: _called(expression, asked, point, step) for key, point in points.items()}
    else:
        found = _by_selector(expression, asked, points)  # type: ignore[arg-type]
    for key, weight in found.items():
        if isinstance(weight, torch.Tensor):
            found[key] = _gates(expression, weight, attached, [points[key]])
        else:
            _check_weight(expression, weight, attached, points[key])
    return PerPoint(found)


def _called(expression: Expression, function: Callable[..., Any], point: InjectionPoint, step: int) -> Any:
    try:
        return function(point, step)
    except Exception as error:
        told = f"the weight function of {expression!r} raised {type(error).__name__} at {point.id}: {error}"
        raise ConfigError([told], "weights") from error


def _gates(
    expression: Expression, values: torch.Tensor, attached: Sequence[Attached], points: Sequence[InjectionPoint]
) -> Gates:
    """Weights that were computed, checked to have a place at these points."""
    if not values.is_floating_point() or values.ndim not in (1, 2):
        told = f"a weight must be a floating-point tensor [rows] or [rows, tokens], not {tuple(values.shape)}"
        raise ConfigError([f"{expression!r}: {told} of {values.dtype}"], "weights")
    for point in points:
        if reason := _ungated(point, values.ndim > 1) or _undivided(point, attached):
            raise RoutingError(f"{expression!r} cannot be weighted for each row: {reason}")
    return Gates(values)


def _ungated(point: InjectionPoint, by_token: bool) -> str | None:
    if isinstance(point, (WeightPoint, OutputPoint)) and not point.is_read:
        return tokenless(point) if by_token else None
    return f"at {point.id} there is no output of its own to be multiplied"


def _undivided(point: InjectionPoint, attached: Sequence[Attached]) -> str | None:
    return f"it acts or does not at {point.id}" if any(_fixed(one, point) for one in attached) else None


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
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not _is_finite(weight):
        expected = "a finite number, a number for each selector, or a function of (point, step)"
        raise ConfigError([f"the weight of {expression!r}{where} must be {expected}, not {shown(weight)}"], "weights")
    multiplies = any(_multiplies(one, at) for one in attached)
    if weight < 0 and multiplies:
        told = f"{expression!r} multiplies attention{where}, so its weight must not be negative, but it is {weight!r}"
        raise ConfigError([told], "weights")
    fixed = [key for one in attached for key in _fixed(one, at)[:1]]
    if fixed and weight not in (0, 1):
        raise ConfigError(
            [f"{expression!r} acts or does not at {fixed[0]}: its weight must be 1, not {weight!r}"], "weights"
        )


def _multiplies(one: Attached, at: InjectionPoint | None) -> bool:
    """Whether an adapter's weight multiplies attention: anywhere, or at one point."""
    if at is None:
        return one.facts.extends
    return isinstance(at, AttentionPoint) and at.id in one.modules and one.modules[at.id].abilities.extend


def _fixed(one: Attached, at: InjectionPoint | None) -> Sequence[str]:
    """Where an adapter acts or does not: of all its points, or of one."""
    if at is None:
        return one.facts.fixed
    module = one.modules.get(at.id)
    return () if module is None or module.scalable else (at.id,)


def _is_finite(weight: float) -> bool:
    try:
        return math.isfinite(weight)
    except OverflowError:  # an int that no float holds
        return False


def _asked(choice: Expression | Sequence[Expression] | Mapping[Expression, Asked]) -> Mapping[Expression, Asked]:
    if isinstance(choice, (str, Composition)):
        return {choice: 1.0}
    if isinstance(choice, Mapping):
        return choice
    if not isinstance(choice, Iterable):
        raise ConfigError(
            [f"expected a name, names, a mapping of names to weights, or None, not {shown(choice)}"], "activate()"
        )
    names = [_checked_expression(name) for name in choice]
    if repeated := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise ConfigError(
            [f"{name!r} is named twice; give it a weight: {{{name!r}: 2.0}}" for name in repeated], "activate()"
        )
    return dict.fromkeys(names, 1.0)


def check_together(weights: Mapping[Expression, Weight], adapters: Mapping[str, Attached]) -> None:
    """Checks expressions of adapters that are all attached, and what acts beside what.

    Raises:
        ConfigError: An adapter that acts or does not (`AdapterModule.scalable`) has a part of a weight, or company.
        RoutingError: `Split` names an adapter that acts where there is no axis of tokens; or positions are counted
            where another adapter adds some.
    """
    for expression in weights:
        _check_splits(expression, adapters)
        _check_outermost(expression, adapters)
    _check_alone(weights, adapters)
    _check_positions(weights, adapters)


def check_routable(name: str, adapter: Attached) -> None:
    """Raises RoutingError where the rows of a batch cannot have this adapter each for itself."""
    if reason := adapter.facts.no_rows:
        raise RoutingError(f"{name!r} cannot be routed: {reason}")


def _check_splits(expression: Expression, adapters: Mapping[str, Attached]) -> None:
    if isinstance(expression, str):
        return
    for part in expression.parts:
        _check_splits(part, adapters)
    if not isinstance(expression, Split):
        return
    for name in expression.names:
        if reason := adapters[name].facts.no_tokens:
            raise RoutingError(f"Split cannot give {name!r} a span of tokens: {reason}")


def _check_outermost(expression: Expression, adapters: Mapping[str, Attached]) -> None:
    for name in names_of(expression):
        at = adapters[name].facts.outermost
        if at is not None and (share_of(name, expression) != 1 or _is_split(name, expression)):
            told = f"{name!r} acts around all others at {at}, which {expression!r} cannot say of it; name it for itself"
            raise ConfigError([told], "activate()")


def _check_alone(weights: Mapping[Expression, Weight], adapters: Mapping[str, Attached]) -> None:
    several = sum(len(names_of(expression)) for expression in weights) > 1
    for expression, weight in weights.items():
        for name in names_of(expression):
            fixed = adapters[name].facts.fixed
            if isinstance(weight, PerPoint):
                fixed = [key for key in fixed if _acts(weight, key)]
            if not fixed or not _acts(weight, fixed[0]):
                continue
            _check_whole(name, fixed[0], expression)
            for key in fixed if several else ():
                if not adapters[name].modules[key].outermost:
                    _check_company(name, adapters[name].points[key], weights, adapters)


def _check_whole(name: str, key: str, expression: Expression) -> None:
    share = share_of(name, expression)
    if share == 1 and not _is_split(name, expression):
        return
    told = f"{expression!r} has {name!r} with weight {share:g}" if share != 1 else f"{expression!r} splits {name!r}"
    raise ConfigError([f"{told}, but it acts or does not at {key}: its weight must be 1, for all tokens"], "activate()")


def _check_company(
    name: str, point: InjectionPoint, weights: Mapping[Expression, Weight], adapters: Mapping[str, Attached]
) -> None:
    routed = any(not isinstance(weight, (int, float, PerPoint)) for weight in weights.values())
    present = [one for expression, weight in weights.items() if _acts(weight, point.id) for one in names_of(expression)]
    here = [one for one in present if point.id in adapters[one].modules]
    here = [one for one in here if not adapters[one].modules[point.id].outermost]
    if point.lengthens:  # any number of them stand one behind the other, and a row sees its own
        here = [] if routed else [one for one in here if one == name]
    if len(here) > 1:
        others = ", ".join(repr(one) for one in dict.fromkeys(here) if one != name) or "itself"
        raise ConfigError([f"{name!r} acts or does not at {point.id}, and not beside {others}"], "activate()")


def _check_positions(weights: Mapping[Expression, Weight], adapters: Mapping[str, Attached]) -> None:
    names = [name for expression in weights for name in names_of(expression)]
    longer = [name for name in names if adapters[name].facts.lengthens]
    if not longer:
        return
    counting = [repr(one) for one in weights if any(_is_split(name, one) for name in names_of(one))]
    counting += [repr(name) for name in names if adapters[name].facts.positional]
    if counting:
        raise RoutingError(
            f"{counting[0]} counts the positions of the sequence, and {longer[0]!r} adds some to it: they would not be "
            "the same positions as without it. Activate one of them at a time"
        )


def _acts(weight: Weight, key: str) -> bool:
    if isinstance(weight, PerPoint):
        return weight.get(key, 0.0) != 0
    return not isinstance(weight, (int, float)) or weight != 0


def _is_split(name: str, expression: Expression) -> bool:
    if not isinstance(expression, Composition) or name not in expression.names:
        return False
    return isinstance(expression, Split) or any(_is_split(name, part) for part in expression.parts)
