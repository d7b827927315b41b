"""`adapterkit extract`: what a fine-tuned model has learnt, as an adapter."""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.adapter_files import DTYPES, new_type, rank_options, rule_of, say_error
from adapterkit.cli.messages import plain_warnings, say

_RANK = 32


@click.command(
    "extract", epilog="Example: adapterkit extract ./tuned ./base --rank 64 --conv-rank 16 -o style.safetensors"
)
@click.argument("tuned", metavar="TUNED")
@click.argument("base", metavar="BASE")
@click.option("-o", "--output", required=True, type=new_type, help="The new file or folder.")
@rank_options
@click.option("--targets", default="all", show_default=True, help="A selector of weights.")
@click.option("--others", is_flag=True, help="Keep changes of biases and norms too, exactly.")
@click.option("--least", type=float, default=0.0, help="Take changes of at most this for none: rounding.")
@click.option("--format", "to_format", metavar="NAME", default="native", show_default=True, help="Of the new file.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of the new tensors.")
def command(
    tuned: str,
    base: str,
    output: Path,
    rank: int | None,
    conv_rank: int | None,
    energy: float | None,
    ratio: float | None,
    error: float | None,
    targets: str,
    others: bool,
    least: float,
    to_format: str,
    dtype: str,
) -> None:
    """Approximate how the weights of the model TUNED differ from those of BASE by an adapter."""
    click.get_current_context().with_resource(plain_warnings())
    rule = rule_of(rank=rank, conv_rank=conv_rank, energy=energy, ratio=ratio, error=error)
    import torch

    from adapterkit.tools.base import open_base
    from adapterkit.tools.extract import extract
    from adapterkit.tools.files import write
    from adapterkit.tools.ranks import RankRule

    models = [open_base(name) for name in (tuned, base)]
    done = extract(models[0], models[1], rule or RankRule(rank=_RANK), targets=targets, others=others, least=least)
    report = write(done.checkpoint, output, format=to_format, points=models[1].points, dtype=getattr(torch, dtype))
    for note in report.notes:
        say(f"{output}: {note}", err=True)
    say(f"{output}  {to_format}")
    say_error(done)
    if done.others:
        say(f"not in it: changes of {len(done.others)} biases and norms, which --others keeps")
