"""What a backend says of a model, compared with its contract and with the model, before anybody relies on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from torch import nn

from adapterkit.backend import AttentionSeam, Reach
from adapterkit.contract.layouts import Repeats
from adapterkit.errors import PluginError, near_matches
from adapterkit.mapping.layouts import first_path
from adapterkit.points import LAYOUTS, AttentionPoint, InjectionPoint


def checked_points(found: object, model: nn.Module, component: str) -> list[InjectionPoint]:
    """What `Backend.points` has returned, if it is what it must be.

    Raises:
        PluginError: It is no sequence of points, or a point does not fit the model.
    """
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise PluginError(f"returned {found!r:.80}; expected a list of InjectionPoint")
    points: list[InjectionPoint] = []
    paths: set[str] = set()
    for point in found:
        if not isinstance(point, InjectionPoint):
            raise PluginError(f"returned {point!r:.80} among the points; expected only InjectionPoint")
        if problem := _problem(point, component):
            raise PluginError(f"the point {point.role!r} at {point.path!r} {problem}")
        if point.path not in paths:
            _check_path(model, point.path, f"the point {point.role!r} is at")
            paths.add(point.path)
        points.append(point)
    return points


def checked_reach(found: object, model: nn.Module, point: InjectionPoint) -> Reach:
    """What `Backend.reach` has returned, if it is what it must be.

    Raises:
        PluginError: It is no Reach, or what it holds is of no use at this point.
    """
    if not isinstance(found, Reach):
        raise PluginError(f"returned {found!r:.80} for {point.id}; expected a Reach")
    if isinstance(point, AttentionPoint) and not isinstance(found.seam, AttentionSeam):
        raise PluginError(f"returned Reach(seam={found.seam!r:.80}) for {point.id}; expected an AttentionSeam")
    for name in ("plain", "lengthening"):
        value = getattr(found, name)
        if value is not None and not callable(value):
            raise PluginError(f"returned Reach({name}={value!r:.80}) for {point.id}; expected a function, or None")
    for name, what in (("attending", "attends to"), ("counting", "counts positions for")):
        called: object = getattr(found, name)
        if not isinstance(called, Mapping) or not all(map(callable, called.values())):
            raise PluginError(f"returned Reach({name}={called!r:.80}) for {point.id}; expected path -> function")
        for path in called:
            _check_path(model, path, f"what {what} {point.id} is at")
    for path in found.reading:
        _check_path(model, path.rpartition(".")[0], f"what reads beyond {point.id} is at")
    return found


def checked_repeats(found: object, point: InjectionPoint) -> Repeats | None:
    """What `Backend.repeats` has returned, if it is what it must be; PluginError where it is not."""
    if found is None or found in get_args(Repeats):
        return found  # type: ignore[return-value]
    raise PluginError(f"returned {found!r:.80} for {point.id}; expected 'each', 'whole' or None")


def check_ids(points: Sequence[InjectionPoint]) -> None:
    """Raises PluginError where two points have one id."""
    first: dict[str, InjectionPoint] = {}
    for point in points:
        other = first.setdefault(point.id, point)
        if other is not point:
            raise PluginError(
                f"two points have the id {point.id!r}, at {other.path!r} ({other.kind}) and at {point.path!r} "
                f"({point.kind}). An id is role@component.site: give them different roles, or put the second into a "
                "Group of its own with another site"
            )


def _problem(point: InjectionPoint, component: str) -> str | None:
    """What of a point does not fit the rest of it."""
    if not all(isinstance(text, str) for text in (point.role, point.path, point.site)) or not point.role:
        return f"has the site {point.site!r}; role, path and site must be strings, and the role not empty"
    if point.component != component:
        return f"is of the component {point.component!r}; expected tags={{'component': {component!r}, ...}}"
    expected = LAYOUTS.get(type(point))
    if expected is None:
        return f"is a {type(point).__name__}; expected one of {', '.join(cls.__name__ for cls in LAYOUTS)}"
    if not isinstance(point.layout, expected):
        return f"has the layout {type(point.layout).__name__}; a {type(point).__name__} has a {expected.__name__}"
    widths = (point.in_features, point.out_features)
    if not all(isinstance(width, int) and width > 0 for width in widths):
        return f"has (in_features, out_features) {widths!r}; expected positive integers"
    return None


def _check_path(model: nn.Module, path: str, what: str) -> None:
    if first_path(model, path) is not None:
        return
    close = near_matches(path, [name for name, _ in model.named_modules() if name])
    hint = f" Closest: {', '.join(close)}" if close else ""
    raise PluginError(f"{what} {path!r}, where the model has no module.{hint}")
