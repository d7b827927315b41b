"""What a user may say that should act, and the selection that it means."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from adapterkit.compose import Selection
from adapterkit.errors import ConfigError, RoutingError, UnknownNameError
from adapterkit.points import WeightLayout
from adapterkit.state import Attached

Choice = str | Sequence[str] | Mapping[str, float] | None
"""A name, several names, names with weights, or nothing."""


def to_selection(choice: Choice, adapters: Mapping[str, Attached]) -> Selection:
    """The selection that a choice among these adapters means.

    Raises:
        UnknownNameError: A name is none of theirs.
        ConfigError: A weight is not a finite number, or negative where it multiplies attention.
    """
    if choice is None:
        return Selection()
    weights = _weights(choice)
    check_names(weights, adapters)
    problems = [problem for name, weight in weights.items() if (problem := _problem(name, weight, adapters[name]))]
    if problems:
        raise ConfigError(problems, "weights")
    return Selection({name: float(weight) for name, weight in weights.items()})


def to_routes(routes: Sequence[str | None], adapters: Mapping[str, Attached]) -> Selection:
    """The selection that gives every row of a batch its own adapter.

    Args:
        routes: One name for each row; None is the base.
        adapters: What there is to name.

    Raises:
        UnknownNameError: A name is none of theirs.
        ConfigError: `routes` is no sequence of names.
        RoutingError: An adapter acts where one weight serves the whole batch.
    """
    if isinstance(routes, str) or not isinstance(routes, Sequence) or not routes:
        raise ConfigError([f"expected one name or None for each sample of the batch, not {routes!r}"], "routed()")
    names = list(dict.fromkeys(name for name in routes if name is not None))
    check_names(names, adapters)
    for name in names:
        if reason := _no_rows(adapters[name]):
            raise RoutingError(f"{name!r} cannot be routed: {reason}")
    rows = {name: torch.tensor([float(route == name) for route in routes]) for name in names}
    return Selection(rows)


def _no_rows(adapter: Attached) -> str | None:
    read = [p for p in adapter.points.values() if isinstance(p.layout, WeightLayout) and p.layout.access == "read"]
    return f"the model reads the weight at {read[0].id} once for the whole batch" if read else None


def check_names(names: Iterable[object], adapters: Mapping[str, Attached]) -> None:
    """Raises UnknownNameError for a name that is no adapter's."""
    for name in names:
        if name not in adapters:
            raise UnknownNameError("adapter", str(name), adapters, "" if adapters else "Nothing is attached.")


def _problem(name: str, weight: object, adapter: Attached) -> str | None:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        return f"the weight of {name!r} must be a finite number, not {weight!r}"
    if weight < 0 and any(point.kind == "attention" for point in adapter.points.values()):
        return f"{name!r} multiplies attention, so its weight must not be negative, but it is {weight!r}"
    return None


def _weights(choice: str | Sequence[str] | Mapping[str, float]) -> Mapping[str, float]:
    if isinstance(choice, str):
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
