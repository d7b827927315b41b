"""`adapterkit convert`: an adapter in the format of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.adapter_files import (
    base_option,
    file_type,
    lenient_option,
    one_thread,
    opened,
    output_options,
    pickle_option,
    points_of,
    rank_options,
    rule_of,
    say_error,
    written,
)
from adapterkit.cli.messages import plain_warnings, say

if TYPE_CHECKING:
    from adapterkit.checkpoint import Checkpoint
    from adapterkit.tools.files import Loaded
    from adapterkit.tools.ranks import RankRule

_NEAR = 0.01


@click.command(
    "convert", epilog="Example: adapterkit convert a.safetensors --format kohya --base ./model -o b.safetensors"
)
@click.argument("file", type=file_type)
@output_options
@base_option
@click.option("--approximate", is_flag=True, help="Write what the format cannot say as the LoRA that is nearest to it.")
@rank_options
@lenient_option
@pickle_option
def command(
    file: Path,
    output: Path,
    to_format: str | None,
    dtype: str | None,
    base: str | None,
    approximate: bool,
    rank: int | None,
    conv_rank: int | None,
    energy: float | None,
    ratio: float | None,
    error: float | None,
    lenient: bool,
    allow_pickle: bool,
) -> None:
    """Write the adapter in FILE in another format, exactly, or not at all. Ranks are for --approximate."""
    click.get_current_context().with_resource(plain_warnings())
    click.get_current_context().with_resource(one_thread())
    rule = rule_of(rank=rank, conv_rank=conv_rank, energy=energy, ratio=ratio, error=error)
    if rule is not None and not approximate:
        raise click.UsageError("ranks are for --approximate; resize changes those of a LoRA")
    loaded = opened(file, points_of(base), allow_pickle=allow_pickle, strict=not lenient)
    from adapterkit.errors import CheckpointError
    from adapterkit.tools.ranks import RankRule

    if rule is not None:
        written(_nearest(loaded, rule), output, loaded, to_format, dtype, approximate=True)
        return
    try:
        made = written(loaded.checkpoint, output, loaded, to_format, dtype, approximate=approximate)
    except CheckpointError as reason:
        if not approximate:
            raise
        say(f"{reason}", err=True)
        made = written(_nearest(loaded, RankRule(error=_NEAR)), output, loaded, to_format, dtype, approximate=True)
    if made:
        say(f"the largest error at a module is {made:.3g} of what it adds")


def _nearest(loaded: Loaded, rule: RankRule) -> Checkpoint:
    from adapterkit.tools.resize import resize

    done = resize(loaded.checkpoint, rule, loaded.points, source=loaded.where)
    say_error(done)
    return done.checkpoint
