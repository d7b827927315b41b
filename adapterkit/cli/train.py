"""`adapterkit train`: train an adapter as a run file says."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.messages import plain_warnings, say

if TYPE_CHECKING:
    from adapterkit.training.result import Result


@click.command("train", epilog="Example: adapterkit train run.yaml steps=500 adapter.rank=16 output=runs/second")
@click.argument("run_file", metavar="RUN.YAML", type=click.Path())
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in the run folder.")
@click.option("--overwrite", is_flag=True, help="Replace the run that the run folder holds.")
@click.option("--accept-changed-data", is_flag=True, help="Resume although the data is not what the run began with.")
@click.option("--dry-run", is_flag=True, help="Check run file, data and model, show what would be trained, and stop.")
def command(
    run_file: str,
    overrides: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    accept_changed_data: bool,
    dry_run: bool,
) -> None:
    """Train an adapter as RUN.YAML says; KEY=VALUE takes precedence over the file."""
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if accept_changed_data and not resume:
        raise click.UsageError("--accept-changed-data belongs to --resume")
    from adapterkit.training.run import load_run

    click.get_current_context().with_resource(plain_warnings())
    run = load_run(run_file, overrides)
    for override in overrides:
        say(f"override {override}", err=True)
    if dry_run:
        from adapterkit.cli.dry_run import show_plan

        show_plan(run)
        return
    train = _loop()
    result = train(run, resume=resume, overwrite=overwrite, accept_changed_data=accept_changed_data)
    if result.exit_code:
        _say_how_to_go_on(result, run_file, overrides)
    _summary(result)


def _loop() -> Callable[..., Result]:
    from adapterkit.errors import MissingDependencyError

    try:
        from adapterkit.training.loop import train
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"training needs {error.name!r}, which is not installed. Run: pip install 'adapterkit[train]'"
        ) from error
    return train


def _say_how_to_go_on(result: Result, run_file: str, overrides: tuple[str, ...]) -> None:
    again = shlex.join(["adapterkit", "train", run_file, *overrides, "--resume"])
    kept = f"a checkpoint of step {result.saved} is there" if result.saved else "there is no checkpoint yet"
    told = "a checkpoint is saved" if result.saved == result.step else f"{kept}, and what came after it is lost"
    with contextlib.suppress(OSError):  # the terminal may be gone
        say(f"stopped after step {result.step}; {told}. To go on: {again}", err=True)
    sys.exit(result.exit_code)


def _summary(result: Result) -> None:
    rows: dict[str, Any] = {"steps": result.step, "loss (last steps)": f"{result.loss:.4f}"}
    rows |= {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in result.figures.items()}
    rows |= {"samples": result.folder / "samples", "metrics": result.folder / "metrics.jsonl"}
    if result.adapter is not None:
        rows["adapter"] = f"{result.adapter} ({result.adapter.stat().st_size / 1024:.0f} KiB)"
    width = max(map(len, rows))
    for key, value in rows.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        say(f"{key.ljust(width)}  {text}")
