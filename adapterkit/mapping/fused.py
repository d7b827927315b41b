"""Layers of which several points are rows, as a whole: for types that have no parts, and files that name layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from adapterkit.points import InjectionPoint, Tag, WeightPoint


def fused_points(points: Iterable[InjectionPoint]) -> list[InjectionPoint]:
    """The role `fused.*` (`fused.attn`, `fused.mlp`) at every layer whose rows are those of several points.

    No preset, glob or path reaches them: they are chosen by a selector that begins with `fused`. What acts there acts
    before what acts at the parts. Stacks of experts have none.

    Args:
        points: A model's.
    """
    layers: dict[tuple[str, str, str], list[WeightPoint]] = {}
    for point in points:
        if isinstance(point, WeightPoint) and point.span is not None and point.layout.index is None:
            layers.setdefault((point.component, point.path, point.layout.parameter), []).append(point)
    found: dict[str, InjectionPoint] = {}
    for parts in layers.values():
        if (whole := _whole(parts)) is not None:
            whole = replace(whole, site=whole.path) if whole.id in found else whole
            found[whole.id] = whole
    return list(found.values())


def _whole(parts: Sequence[WeightPoint]) -> WeightPoint | None:
    """The layer; None where rows of it are no point's, or of several."""
    first = parts[0]
    rows = sorted(row for point in parts if point.span is not None for row in _rows(point))
    if len(parts) < 2 or rows != list(range(len(rows))) or any(point.in_span is not None for point in parts):
        return None
    tags: dict[str, Tag] = {
        name: tag for name, tag in first.tags.items() if all(point.tags.get(name) == tag for point in parts)
    }
    site = first.site if all(point.site == first.site for point in parts) else first.path
    role = f"fused.{first.role.partition('.')[0]}"
    return replace(first, role=role, site=site, out_features=len(rows), span=None, tags=tags)


def _rows(point: WeightPoint) -> Iterable[int]:
    span = point.span
    if span is None:
        return ()
    starts = range(span.start, span.start + span.count * (span.step or 1), span.step or 1)[: span.count]
    return (row for start in starts for row in range(start, start + span.size))
