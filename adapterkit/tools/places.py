"""Where points lie, in words for tables and plots: component, block and role; of made-up points too."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapterkit.formats.modules import MADE_UP

_PIECES = re.compile(r"[^._]+")


@dataclass(frozen=True)
class Where:
    """A point's place.

    Attributes:
        component: The model.
        block: What is repeated: `3`, `down.0.1.0`, or the file's words for it; "" for what lies in no block.
        role: What the point is in each of these.
    """

    component: str
    block: str
    role: str


def places(keys: Iterable[str]) -> dict[str, Where]:
    """Point id -> where that is.

    Ids of a model's points say it. Of a name in a file, the block ends with the last number below which there are
    several modules.
    """
    found: dict[str, Where] = {}
    names: dict[tuple[str, str], str] = {}
    for key in keys:
        role, _, place = key.partition("@")
        component, _, site = place.partition(".")
        if role in MADE_UP:
            names[component, site] = key
        else:
            found[key] = Where(component, site, role)
    crowd = collections.Counter((component, start) for component, name in names for start, _ in _cuts(name))
    for (component, name), key in names.items():
        cuts = [cut for cut in _cuts(name) if crowd[component, cut[0]] > 1]
        block, role = cuts[-1] if cuts else ("", name)
        found[key] = Where(component, block, role)
    return found


def _cuts(name: str) -> list[tuple[str, str]]:
    """Where a name can be cut in two: behind each number that does not end it."""
    pieces = [*_PIECES.finditer(name)]
    return [(name[: one.end()], name[two.start() :]) for one, two in itertools.pairwise(pieces) if one[0].isdigit()]


def in_order(blocks: Iterable[str]) -> list[str]:
    """Blocks as people count them: 2 before 10."""
    return sorted(
        set(blocks), key=lambda block: [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", block)]
    )


def grid(
    where: Mapping[str, Where], values: Mapping[str, float]
) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Values by block and role, for those that have one: the root of the sum of their squares where several meet.

    Returns:
        Blocks (with their component), roles, and a row for each block; None where there is nothing.
    """
    cells: dict[tuple[str, str], float] = {}
    for key, value in values.items():
        one = where[key]
        cell = (f"{one.component} {one.block}".strip(), one.role)
        cells[cell] = (cells.get(cell, 0.0) ** 2 + value**2) ** 0.5
    blocks, roles = in_order(block for block, _ in cells), sorted({role for _, role in cells})
    return blocks, roles, [[cells.get((block, role)) for role in roles] for block in blocks]
