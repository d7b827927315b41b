"""What a switch must know of an adapter: told once, when it is attached, so that no switch walks points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapterkit.adapter import AdapterModule
from adapterkit.points import (
    AttentionPoint,
    InjectionPoint,
    OutputPoint,
    TokensPoint,
    WeightPoint,
)


@dataclass(frozen=True)
class Facts:
    """Of all points of one adapter together.

    Attributes:
        extends: Whether it extends keys and values somewhere, so that its weight multiplies attention.
        lengthens: Whether it makes a sequence longer somewhere.
        positional: Whether it counts the positions of a sequence somewhere.
        fixed: Ids of the points where it acts or does not (`AdapterModule.scalable`).
        outermost: Id of a point where it acts around all others (`AdapterModule.outermost`), or None.
        no_rows: Why the rows of a batch cannot have it each for itself, or None.
        no_tokens: Why it cannot be given a span of tokens, or None.
        experts: By the model's name, its modules at experts: a call may reach some of them and not others.
    """

    extends: bool
    lengthens: bool
    positional: bool
    fixed: tuple[str, ...]
    outermost: str | None
    no_rows: str | None
    no_tokens: str | None
    experts: Mapping[str, Sequence[AdapterModule]]

    @classmethod
    def of(cls, points: Mapping[str, InjectionPoint], modules: Mapping[str, AdapterModule]) -> Facts:
        """Those of an adapter with these modules at these points."""
        fixed = tuple(key for key, module in modules.items() if not module.scalable)
        experts: dict[str, list[AdapterModule]] = {}
        for key, point in points.items():
            if "expert" in point.tags:
                experts.setdefault(point.model, []).append(modules[key])
        return cls(
            experts=experts,
            extends=any(isinstance(points[key], AttentionPoint) and m.abilities.extend for key, m in modules.items()),
            lengthens=any(point.lengthens for point in points.values()),
            positional=any(module.positional for module in modules.values()),
            fixed=fixed,
            outermost=next((key for key, module in modules.items() if module.outermost), None),
            no_rows=_no_rows(points, fixed),
            no_tokens=next((reason for point in points.values() if (reason := tokenless(point))), None),
        )


def _no_rows(points: Mapping[str, InjectionPoint], fixed: tuple[str, ...]) -> str | None:
    read = [point for point in points.values() if point.is_read]
    if read:
        return f"the model reads the weight at {read[0].id} once for the whole batch"
    unmasked = [point for point in points.values() if point.lengthens and not point.layout.masked]
    if unmasked:
        return f"at {unmasked[0].id} there is no mask by which other rows would not see its positions"
    replaced = [key for key in fixed if not isinstance(points[key], TokensPoint)]
    return f"at {replaced[0]} it replaces the base, which other rows would need" if replaced else None


def tokenless(point: InjectionPoint) -> str | None:
    """Why a point has no axis of tokens, or None."""
    if not isinstance(point, (WeightPoint, OutputPoint)):
        return f"at {point.id} it acts on the whole sequence"
    if point.is_read or (isinstance(point, WeightPoint) and point.layout.kernel):
        return f"there is no axis of tokens at {point.id}"
    return None
