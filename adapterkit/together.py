"""Which adapters can act together, and where: checked when they are chosen, not in a forward."""

from __future__ import annotations

from collections.abc import Mapping

from adapterkit.composition import Composition, Expression, Split, names_of, share_of
from adapterkit.errors import ConfigError, RoutingError
from adapterkit.points import InjectionPoint, TokensLayout, WeightLayout
from adapterkit.selection import PerPoint, Weight
from adapterkit.state import Attached


def check_together(weights: Mapping[Expression, Weight], adapters: Mapping[str, Attached]) -> None:
    """Checks expressions of adapters that are all attached, and what acts beside what.

    Raises:
        ConfigError: An adapter that acts or does not (`AdapterModule.scalable`) has a part of a weight, or company.
        RoutingError: `Split` names an adapter that acts where there is no axis of tokens; or positions are counted
            where another adapter adds some.
    """
    for expression in weights:
        _check_splits(expression, adapters)
    _check_alone(weights, adapters)
    _check_positions(weights, adapters)


def check_rows(name: str, adapter: Attached) -> None:
    """Raises RoutingError where the rows of a batch cannot have this adapter each for itself."""
    if reason := _no_rows(adapter):
        raise RoutingError(f"{name!r} cannot be routed: {reason}")


def _no_rows(adapter: Attached) -> str | None:
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


def _no_tokens(point: InjectionPoint) -> str | None:
    layout = point.layout
    if point.kind not in ("weight", "output"):
        return f"at {point.id} it acts on the whole sequence"
    if isinstance(layout, WeightLayout) and (layout.kernel or layout.access == "read"):
        return f"there is no axis of tokens at {point.id}"
    return None


def _check_alone(weights: Mapping[Expression, Weight], adapters: Mapping[str, Attached]) -> None:
    for expression, weight in weights.items():
        for name in names_of(expression):
            for key, module in adapters[name].modules.items():
                if not module.scalable and _acts(weight, key):
                    _check_whole(name, key, expression)
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
    if _lengthens(point):  # any number of them stand one behind the other, and a row sees its own
        here = [] if routed else [one for one in here if one == name]
    if len(here) > 1:
        others = ", ".join(repr(one) for one in dict.fromkeys(here) if one != name) or "itself"
        raise ConfigError([f"{name!r} acts or does not at {point.id}, and not beside {others}"], "activate()")


def _check_positions(weights: Mapping[Expression, Weight], adapters: Mapping[str, Attached]) -> None:
    names = [name for expression in weights for name in names_of(expression)]
    longer = [name for name in names if any(map(_lengthens, adapters[name].points.values()))]
    if not longer:
        return
    counting = [f"{expression!r}" for expression in weights if _has_split(expression)]
    counting += [f"{name!r}" for name in names if any(one.positional for one in adapters[name].modules.values())]
    if counting:
        raise RoutingError(
            f"{counting[0]} counts the positions of the sequence, and {longer[0]!r} adds some to it: they would not be "
            "the same positions as without it. Activate one of them at a time"
        )


def _acts(weight: Weight, key: str) -> bool:
    if isinstance(weight, PerPoint):
        return weight.get(key, 0.0) != 0
    return not isinstance(weight, (int, float)) or weight != 0


def _lengthens(point: InjectionPoint) -> bool:
    return isinstance(point.layout, TokensLayout) and point.layout.lengthens


def _has_split(expression: Expression) -> bool:
    if not isinstance(expression, Composition):
        return False
    return isinstance(expression, Split) or any(map(_has_split, expression.parts))


def _is_split(name: str, expression: Expression) -> bool:
    if not isinstance(expression, Composition) or name not in expression.names:
        return False
    return isinstance(expression, Split) or any(_is_split(name, part) for part in expression.parts)
