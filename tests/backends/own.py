"""What a family's own table lists: all points but those that every family has alike."""

from __future__ import annotations

from collections.abc import Iterable

from adapterkit.points import InjectionPoint, Points


def own(points: Iterable[InjectionPoint]) -> Points:
    """Without norms, hidden states, prompts and layers of which parts are points."""
    everywhere = ("norm", "hidden", "prompt", "prompt.layer")
    return Points(p for p in points if p.role not in everywhere and not p.role.startswith("fused."))
