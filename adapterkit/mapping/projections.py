"""Which layers make the keys and values of an attention: the points beside it with the roles `.k` and `.v`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from adapterkit.points import AttentionPoint, InjectionPoint, WeightPoint


def with_sources(points: Sequence[InjectionPoint]) -> list[InjectionPoint]:
    """The same points, where each attention knows the width of what its keys and values are made from."""
    by_id = {point.id: point for point in points}
    return [_with_source(point, by_id) if isinstance(point, AttentionPoint) else point for point in points]


def projection_points(
    point: AttentionPoint, by_id: Mapping[str, InjectionPoint]
) -> tuple[WeightPoint, WeightPoint] | None:
    """The points of an attention's keys and of its values; None where there are none, or they make other widths."""
    layout, (role, _, site) = point.layout, point.id.partition("@")
    around = role.rpartition(".")[0]
    keys, values = (by_id.get(f"{around}.{one}@{site}") for one in "kv")
    if not isinstance(keys, WeightPoint) or not isinstance(values, WeightPoint):
        return None
    if keys.in_features != values.in_features:
        return None
    widths = (layout.kv_heads * layout.head_dim, layout.kv_heads * layout.value_width)
    return (keys, values) if (keys.out_features, values.out_features) == widths else None


def _with_source(point: AttentionPoint, by_id: Mapping[str, InjectionPoint]) -> AttentionPoint:
    found = projection_points(point, by_id)
    if found is None:
        return point
    return dataclasses.replace(point, layout=dataclasses.replace(point.layout, source=found[0].in_features))
