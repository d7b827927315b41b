"""`adapterkit resize`: an adapter of other ranks, with the error that makes; without a rank, which would be enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.adapter_files import (
    DTYPES,
    base_option,
    file_type,
    lenient_option,
    new_type,
    one_thread,
    opened,
    pickle_option,
    points_of,
    rank_options,
    rule_of,
    say_error,
    written,
)
from adapterkit.cli.messages import plain_warnings, say
from adapterkit.cli.tables import show

if TYPE_CHECKING:
    from adapterkit.tools.files import Loaded
    from adapterkit.tools.resize import Resized

_ENOUGH = 0.1


@click.command("resize", epilog="Example: adapterkit resize big.safetensors --error 0.1 -o small.safetensors")
@click.argument("file", type=file_type)
@click.option("-o", "--output", type=new_type, help="The new file or folder; without it, a rank is recommended.")
@rank_options
@click.option("--format", "to_format", metavar="NAME", help="Of the new file; by default that of FILE.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the new tensors; by default the widest that FILE has.")
@base_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every point.")
@lenient_option
@pickle_option
def command(
    file: Path,
    output: Path | None,
    rank: int | None,
    conv_rank: int | None,
    energy: float | None,
    ratio: float | None,
    error: float | None,
    to_format: str | None,
    dtype: str | None,
    base: str | None,
    as_json: bool,
    lenient: bool,
    allow_pickle: bool,
) -> None:
    """Give the adapter in FILE other ranks, or, without -o, say what each rank would lose and which is enough."""
    click.get_current_context().with_resource(plain_warnings())
    click.get_current_context().with_resource(one_thread())
    rule = rule_of(rank=rank, conv_rank=conv_rank, energy=energy, ratio=ratio, error=error)
    if output is None:
        if rule is not None and error is None:
            raise click.UsageError("name the new file: -o NEW; without it, --error alone is heeded")
        loaded = opened(file, points_of(base), allow_pickle=allow_pickle, strict=not lenient)
        _recommend(loaded, error or _ENOUGH, as_json)
        return
    if rule is None:
        raise click.UsageError("say what to keep: --rank, --energy, --ratio or --error")
    from adapterkit.tools.resize import resize

    loaded = opened(file, points_of(base), allow_pickle=allow_pickle, strict=not lenient)
    done = resize(loaded.checkpoint, rule, loaded.points, source=file)
    if as_json:
        written(done.checkpoint, output, loaded, to_format, dtype, quiet=True)
        click.echo(json.dumps(_record(done), indent=2))
        return
    written(done.checkpoint, output, loaded, to_format, dtype)
    say_error(done)


def _record(done: Resized) -> dict[str, Any]:
    points = {key: vars(one) for key, one in done.points.items()}
    return {"error": done.error, "points": points, "kept": list(done.kept)}


def _recommend(loaded: Loaded, error: float, as_json: bool) -> None:
    from adapterkit.tools.ranks import rank_errors, recommended
    from adapterkit.tools.resize import spectra

    found = spectra(loaded.checkpoint, loaded.points, loaded.where)
    rows = [vars(row) for row in rank_errors(found)]
    rank, own = recommended(found, error)
    if as_json:
        errors = {one.point.id: one.error(own[one.point.id]) / one.norm if one.norm else 0.0 for one in found}
        points = {key: {"rank": each, "error": errors[key]} for key, each in own.items()}
        click.echo(json.dumps({"error": error, "rank": rank, "points": points, "ranks": rows}, indent=2))
        return
    shown = [{**row, "error": f"{row['error']:.3g}", "worst": f"{row['worst']:.3g}"} for row in rows]
    show(shown, ("rank", "error", "worst", "where", "parameters"), as_json=False, empty="no weight is changed")
    if rows:
        say(f"\nrank {rank} is enough for an error of {error:g}: --rank {rank} -o NEW")
        low, high = min(own.values()), max(own.values())
        say(f"point by point, ranks {low} to {high}, {sum(own.values())} in all: --error {error:g} -o NEW")
