"""`adapterkit combine`: several adapters as one."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

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
from adapterkit.cli.messages import plain_warnings

_METHODS = ("sum", "magnitude", "ties", "dare", "dare_ties")


@click.command(
    "combine",
    epilog="Example: adapterkit combine ink.safetensors style.safetensors -w 0.8 -w 0.4 --rank 32 -o both.safetensors",
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=file_type)
@output_options
@click.option(
    "-w", "--weight", "weights", multiple=True, type=float, help="Of each FILE in turn; 1 for all by default."
)
@click.option(
    "--block",
    "blocks",
    multiple=True,
    metavar="[N:]SELECTOR=FACTOR",
    help="A further factor on points of the Nth FILE, or of all: 'attn.*=0.5', '2:*@stage=up=0'. The last match wins.",
)
@click.option(
    "--method", type=click.Choice(_METHODS), default="sum", show_default=True, help="How they are put together."
)
@click.option("--density", type=float, default=0.5, show_default=True, help="Part of the entries kept, but for sum.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what dare draws.")
@rank_options
@base_option
@lenient_option
@pickle_option
def command(
    files: tuple[Path, ...],
    output: Path,
    to_format: str | None,
    dtype: str | None,
    weights: tuple[float, ...],
    blocks: tuple[str, ...],
    method: str,
    density: float,
    seed: int,
    rank: int | None,
    conv_rank: int | None,
    energy: float | None,
    ratio: float | None,
    error: float | None,
    base: str | None,
    lenient: bool,
    allow_pickle: bool,
) -> None:
    """Put the adapters in FILE... together: their weighted sum is exact, unless a rank is given."""
    click.get_current_context().with_resource(plain_warnings())
    click.get_current_context().with_resource(one_thread())
    if len(weights) not in (0, len(files)):
        raise click.UsageError(f"give one -w for each of the {len(files)} files, or none; {len(weights)} were given")
    if method == "sum" and click.get_current_context().get_parameter_source("density") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--density is for the other methods: a sum keeps every entry")
    factors = _factors(blocks, len(files))
    rule = rule_of(rank=rank, conv_rank=conv_rank, energy=energy, ratio=ratio, error=error)
    from adapterkit.tools.combine import Share, combine

    points = points_of(base)
    loaded = [opened(file, points, allow_pickle=allow_pickle, strict=not lenient) for file in files]
    if points is None and len({one.report.format for one in loaded}) > 1:
        told = ", ".join(f"{file} ({one.report.format})" for file, one in zip(files, loaded, strict=True))
        raise click.UsageError(f"files of several formats call modules otherwise: {told}; add --base MODEL")
    alone = len({file.name for file in files}) == len(files)
    shares = [
        Share(one.checkpoint, weight, own, file.name if alone else str(file))
        for one, weight, own, file in zip(loaded, weights or (1.0,) * len(files), factors, files, strict=True)
    ]
    done = combine(shares, method, rule=rule, density=density, seed=seed, points=points)
    widest = max(loaded, key=lambda one: one.dtype.itemsize)
    written(done.checkpoint, output, loaded[0], to_format, dtype or str(widest.dtype).removeprefix("torch."))
    say_error(done)


def _factors(blocks: tuple[str, ...], count: int) -> list[dict[str, float]]:
    """For each file, selector -> factor."""
    found: list[dict[str, float]] = [{} for _ in range(count)]
    for text in blocks:
        number, colon, rest = text.partition(":")
        chosen = number if colon and number.isdigit() else ""
        selector, _, factor = (rest if chosen else text).rpartition("=")
        if chosen and not 1 <= int(chosen) <= count:
            raise click.UsageError(f"--block {text}: there are {count} files")
        try:
            value = float(factor)
        except ValueError:
            raise click.UsageError(f"--block {text}: expected SELECTOR=FACTOR, such as 'attn.*=0.5'") from None
        for number_of, own in enumerate(found, 1):
            if not chosen or number_of == int(chosen):
                own[selector] = value
    return found
