"""Weights that several layers of a model have: what is one tensor under the names of two modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from adapterkit.points import InjectionPoint, WeightPoint


def with_ties(points: Sequence[InjectionPoint], modules: Mapping[tuple[str, str], nn.Module]) -> list[InjectionPoint]:
    """The same points, where those of one weight know of each other: see `InjectionPoint.tied`.

    Args:
        points: In model order.
        modules: Model and path -> the module.
    """
    held: dict[tuple[str, int], list[int]] = {}
    for place, point in enumerate(points):
        if isinstance(point, WeightPoint) and _is_whole(point):
            parameter = modules[point.model, point.path]._parameters.get(point.layout.parameter)
            if parameter is not None:
                held.setdefault((point.model, id(parameter)), []).append(place)
    found = [*points]
    for places in held.values():
        if len({points[place].path for place in places}) > 1:
            for place in places:
                found[place] = dataclasses.replace(points[place], tied=points[places[0]].id)
    return found


def _is_whole(point: WeightPoint) -> bool:
    return point.span is None and point.in_span is None and point.layout.index is None and not point.layout.kernel
