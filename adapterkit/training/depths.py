"""Rates that fall from the head of a model to its embedding."""

from __future__ import annotations

from collections.abc import Iterable

from adapterkit.points import InjectionPoint
from adapterkit.selectors import Selector

_BEFORE, _AFTER = "embed.* tokens prompt", "head head.*"


class Depths:
    """How many steps of depth are behind a point: of the last block 1, of what comes before the first one most.

    What is in no block comes before all of them (embeddings, tokens), with the first of its stage, with the last of all
    (norms), or after all: the head, whose factor is 1. The factor is decay to that power, as in BEiT (Bao et al., 2022,
    arXiv:2106.08254) and timm.

    Args:
        points: Of the whole model, in its order.
        decay: What each step multiplies by.
    """

    def __init__(self, points: Iterable[InjectionPoint], decay: float) -> None:
        self._decay, self._before, self._after = decay, Selector(_BEFORE), Selector(_AFTER)
        self._blocks: dict[str, dict[tuple[object, object], int]] = {}
        for point in points:
            if "layer" in point.tags:
                blocks = self._blocks.setdefault(point.component, {})
                blocks.setdefault(_block(point), len(blocks))

    def factor(self, point: InjectionPoint | None) -> float:
        """What multiplies the rate at a point; 1 where nothing is known of it."""
        blocks = {} if point is None else self._blocks.get(point.component, {})
        if point is None or not blocks or self._after.matches(point):
            return 1.0
        if self._before.matches(point):
            return self._decay ** (len(blocks) + 1)
        stage = [number for (name, _), number in blocks.items() if name is not None and name == point.tags.get("stage")]
        number = blocks.get(_block(point), min(stage, default=len(blocks) - 1))
        return self._decay ** (len(blocks) - number)


def _block(point: InjectionPoint) -> tuple[object, object]:
    return point.tags.get("stage"), point.tags.get("layer")
