"""What a family's own table lists: all points but those that every family has alike."""

from __future__ import annotations

from collections.abc import Iterable

from adapterkit.points import InjectionPoint, Points


def own(points: Iterable[InjectionPoint]) -> Points:
    """Without norms, hidden states and prompts."""
    return Points(point for point in points if point.role not in ("norm", "hidden", "prompt", "prompt.layer"))
