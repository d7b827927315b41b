"""`adapterkit diff`: how two adapters differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.adapter_files import (
    base_option,
    file_type,
    lenient_option,
    one_thread,
    opened,
    pickle_option,
    points_of,
)
from adapterkit.cli.messages import plain_warnings, say
from adapterkit.cli.tables import show

if TYPE_CHECKING:
    from adapterkit.tools.difference import Difference, PointDifference

_SHOWN = 20


@click.command("diff", epilog="Example: adapterkit diff before.safetensors after.safetensors")
@click.argument("one", metavar="A", type=file_type)
@click.argument("other", metavar="B", type=file_type)
@base_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every point.")
@lenient_option
@pickle_option
def command(one: Path, other: Path, base: str | None, as_json: bool, lenient: bool, allow_pickle: bool) -> None:
    """Compare what the adapters in A and B add to each weight: norms, the difference, and the angle between."""
    click.get_current_context().with_resource(plain_warnings())
    click.get_current_context().with_resource(one_thread())
    from adapterkit.tools.difference import difference

    points = points_of(base)
    loaded = [opened(file, points, allow_pickle=allow_pickle, strict=not lenient) for file in (one, other)]
    if points is None and loaded[0].report.format != loaded[1].report.format:
        formats = " and ".join(each.report.format for each in loaded)
        raise click.UsageError(f"files of {formats} call modules otherwise; add --base MODEL")
    found = difference(loaded[0].checkpoint, loaded[1].checkpoint, points)
    if as_json:
        click.echo(json.dumps(_record(found), indent=2))
    else:
        _print(found)


def _record(found: Difference) -> dict[str, Any]:
    return {
        "equal": found.equal,
        "relative": found.relative,
        "types": found.types,
        "only in A": list(found.only_one),
        "only in B": list(found.only_other),
        "config": found.configs,
        "metadata": found.metadata,
        "points": [vars(point) for point in found.points],
    }


def _print(found: Difference) -> None:
    if found.equal:
        say(f"equal, bit for bit, at {len(found.points)} points")
    else:
        relative = "unknown without the base" if found.relative is None else f"{found.relative:.3g}"
        differing = sum(not point.equal for point in found.points)
        say(f"differ at {differing} of {len(found.points)} points; relative difference {relative}")
    for name, keys in (("A", found.only_one), ("B", found.only_other)):
        if keys:
            say(f"only in {name}: {len(keys)} points: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}")
    for what, pairs in (("config", found.configs), ("metadata", found.metadata)):
        for key, (a, b) in pairs.items():
            say(f"{what} {key}: {_short(a)} and {_short(b)}")
    apart = sorted((p for p in found.points if not p.equal), key=lambda p: -(p.difference or 0.0))
    if apart:
        click.echo()
        show([_row(point) for point in apart[:_SHOWN]], ("point", "A", "B", "difference", "cosine"), as_json=False)
    if len(apart) > _SHOWN:
        say(f"... and {len(apart) - _SHOWN} more; --json has them all")


def _row(point: PointDifference) -> dict[str, str]:
    numbers = {"A": point.one, "B": point.other, "difference": point.difference, "cosine": point.cosine}
    return {"point": point.key, **{name: "" if n is None else f"{n:.4g}" for name, n in numbers.items()}}


def _short(value: object) -> str:
    text = repr(value).replace("\n", "\\n")
    return text if len(text) <= 60 else f"{text[:57]}..."
