"""Options that commands on adapter files share, and how such files come in and go out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adapterkit.cli.messages import say
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    from adapterkit.checkpoint import Checkpoint
    from adapterkit.points import Points
    from adapterkit.tools.files import Loaded
    from adapterkit.tools.ranks import RankRule
    from adapterkit.tools.resize import Resized

_Command = TypeVar("_Command", bound=Callable[..., Any])

DTYPES = ("float32", "float16", "bfloat16")


class _New(click.Path):
    """What will be written: that it has no place is told before the work, which may take minutes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            raise CheckpointError(f"the folder {path.parent} does not exist; make it with mkdir -p", path)
        return path


file_type = click.Path(path_type=Path)
new_type = _New(path_type=Path)
base_option = click.option(
    "--base", metavar="MODEL", help="The model that it is for: a folder, a hub id or timm:NAME. Points have its names."
)
pickle_option = click.option(
    "--allow-pickle", is_flag=True, help="Open a pickle of tensors, with torch's weights_only."
)
lenient_option = click.option("--lenient", is_flag=True, help="Leave out what belongs to no point of the base.")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For thousands of small operations, in which a second thread mostly waits: much longer, on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def output_options(command: _Command) -> _Command:
    """`-o`, `--format` and `--dtype`."""
    for option in (
        click.option("--dtype", type=click.Choice(DTYPES), help="Of the tensors; by default the widest that came in."),
        click.option("--format", "to_format", metavar="NAME", help="Of the new file; by default that of the first."),
        click.option("-o", "--output", required=True, type=new_type, help="The new file or folder."),
    ):
        command = option(command)
    return command


def rank_options(command: _Command) -> _Command:
    """`--rank`, `--conv-rank`, `--energy`, `--ratio` and `--error`."""
    for option in (
        click.option("--error", type=float, help="Leave out at most this part of the norm: 0.1."),
        click.option("--ratio", type=float, help="Keep singular values from the largest divided by this."),
        click.option("--energy", type=float, help="Keep this part of the sum of squared singular values: 0.99."),
        click.option("--conv-rank", type=int, help="In the place of --rank for convolutions larger than 1 x 1."),
        click.option("--rank", type=int, help="Keep at most so many ranks."),
    ):
        command = option(command)
    return command


def rule_of(**given: Any) -> RankRule | None:
    """What the options of `rank_options` say; None for nothing.

    Raises:
        ConfigError: They contradict each other.
    """
    from adapterkit.tools.ranks import RankRule

    told = {name: value for name, value in given.items() if value is not None}
    return RankRule(**told) if told else None


def points_of(base: str | None) -> Points | None:
    """The points of a model in files; None where none is named."""
    if base is None:
        return None
    from adapterkit.tools.base import open_base

    return open_base(base).points


def opened(file: Path, points: Points | None, *, allow_pickle: bool = False, strict: bool = True) -> Loaded:
    """An adapter's file; what a reader must know of it, and what is left out, goes to stderr."""
    from adapterkit.mapping.targets import some
    from adapterkit.tools.files import read

    loaded = read(file, points, allow_pickle=allow_pickle, strict=strict)
    for note in loaded.report.notes:
        say(f"{file}: {note}", err=True)
    if rest := [*loaded.report.unmatched, *loaded.report.left_over]:
        say(f"{file}: left out {len(rest):,} keys that belong to no point here: {some(rest)}", err=True)
    return loaded


def written(
    checkpoint: Checkpoint,
    output: Path,
    first: Loaded,
    to_format: str | None,
    dtype: str | None,
    *,
    approximate: bool = False,
    quiet: bool = False,
) -> float:
    """Writes what was made from `first`, and says so, unless it is to be quiet.

    Returns:
        The error that the format has made, relative.
    """
    import torch

    from adapterkit.tools.files import write

    came_from = first.report.format
    report = write(
        checkpoint,
        output,
        format=to_format or came_from,
        points=first.points,
        came_from=came_from,
        dtype=first.dtype if dtype is None else getattr(torch, dtype),
        approximate=approximate,
    )
    for note in report.notes:
        say(f"{output}: {note}", err=True)
    if not quiet:
        say(f"{output}  {to_format or came_from}")
    return report.error


def say_error(done: Resized) -> None:
    """What was left out, in a line for people."""
    ranks = sorted({one.rank for one in done.points.values()})
    told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no matrices"
    say(f"{told} at {len(done.points)} points; error {done.error:.3g} of the norm")
    if done.kept:
        say(f"left as they are: {len(done.kept)} points where no matrix is added to a weight")
