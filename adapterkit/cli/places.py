"""Printing injection points: a tree for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterkit.errors import printable
from adapterkit.points import InjectionPoint, Points

if TYPE_CHECKING:
    from rich.tree import Tree

_BYTES = 4  # of one parameter in float32, which adapters are kept in


def show_points(points: Points, *, as_json: bool, full: bool = False) -> None:
    """Prints the points, with what an adapter would add where the points know it.

    Args:
        points: What to print.
        as_json: One object per point instead.
        full: One line per point; otherwise points of one role and shape share a line.
    """
    if as_json:
        click.echo(json.dumps([_record(point, points.costs) for point in points], indent=2))
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(_tree(points, full))


def show_remarks(remarks: Mapping[str, str]) -> None:
    """Prints why modules have no more points, each reason once, with the first module that it is about."""
    about: dict[str, list[str]] = defaultdict(list)
    for place, why in remarks.items():
        about[why].append(place)
    for why, places in about.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        click.echo(printable(f"note: {places[0]}{more}: {why}"))


def _record(point: InjectionPoint, costs: Mapping[str, int]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": point.id,
        "role": point.role,
        "kind": point.kind,
        "component": point.component,
        "path": point.path,
        "shape": list(point.shape),
        "tags": dict(point.tags),
    }
    return {**record, "parameters": costs[point.id]} if point.id in costs else record


def _tree(points: Points, full: bool) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text(_total("", list(points), points.costs)))
    by_component: dict[str, list[InjectionPoint]] = defaultdict(list)
    for point in points:
        by_component[point.component].append(point)
    for component, members in by_component.items():
        branch = root.add(Text(printable(_total(component, members, points.costs)), style="bold"))
        for line in _lines(members, points.costs, full):
            branch.add(Text(printable(line)))
    return root


def _lines(members: Sequence[InjectionPoint], costs: Mapping[str, int], full: bool) -> list[str]:
    if full:
        return [f"{p.id}  {p.kind}  {p.path}  {_shape(p)}{_cost([p], costs)}" for p in members]
    groups: dict[tuple[str, str, str], list[InjectionPoint]] = defaultdict(list)
    for point in members:
        groups[point.role, point.kind, _shape(point)].append(point)
    return [
        f"{role}  {kind}  {shape}  x{len(found)}{_cost(found, costs)}  {found[0].path}"
        for (role, kind, shape), found in groups.items()
    ]


def _total(label: str, members: Sequence[InjectionPoint], costs: Mapping[str, int]) -> str:
    return f"{label}{': ' if label else ''}{len(members)} points{_cost(members, costs)}"


def _cost(members: Sequence[InjectionPoint], costs: Mapping[str, int]) -> str:
    counted = [costs[point.id] for point in members if point.id in costs]
    if not counted:
        return ""
    return f"  +{sum(counted):,} parameters ({sum(counted) * _BYTES / 2**20:.2f} MiB)"


def _shape(point: InjectionPoint) -> str:
    return "x".join(map(str, point.shape))
