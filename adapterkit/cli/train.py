"""`adapterkit train`: train an adapter as a run file says."""

from __future__ import annotations

import contextlib
import importlib
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.messages import plain_warnings, say
from adapterkit.cli.processes import is_first

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
    if "=" in run_file and not Path(run_file).exists():
        raise click.UsageError(f"the run file comes before what changes it: adapterkit train RUN.YAML {run_file}")
    if accept_changed_data and not resume:
        raise click.UsageError("--accept-changed-data belongs to --resume")
    from adapterkit.training.run import load_run

    click.get_current_context().with_resource(plain_warnings())
    run = load_run(run_file, overrides)
    first = is_first()
    for override in overrides if first else ():
        say(f"override {override}", err=True)
    if dry_run:
        from adapterkit.cli.dry_run import show_plan

        if first:
            show_plan(run)
        return
    result = loop().train(run, resume=resume, overwrite=overwrite, accept_changed_data=accept_changed_data)
    if not first:
        sys.exit(result.exit_code)
    if result.exit_code:
        _say_how_to_go_on(result, run_file, overrides)
    if result.finished_before:
        say("nothing is left to do: the run is finished. For more: --resume with more steps or epochs", err=True)
    summary(result)
    end(result)


def loop() -> ModuleType:
    """The module that trains.

    Raises:
        MissingDependencyError: Its library is not installed.
    """
    from adapterkit.errors import MissingDependencyError

    try:
        return importlib.import_module("adapterkit.training.loop")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise MissingDependencyError(
            f"training needs {missing!r}, which is not installed. Run: pip install 'adapterkit[train]'"
        ) from error


def _say_how_to_go_on(result: Result, run_file: str, overrides: tuple[str, ...]) -> None:
    again = shlex.join(["adapterkit", "train", run_file, *overrides, "--resume"])
    finish = shlex.join(["adapterkit", "finish", str(result.folder)])
    with contextlib.suppress(OSError):  # the terminal may be gone
        say(f"{_told(result)}{_ways_on(result, again, finish)}", err=True)
    sys.exit(result.exit_code)


def _told(result: Result) -> str:
    if result.adapter is not None:
        return f"the adapter is written, {result.adapter}; figures, samples or files for other tools are left out"
    if not result.step:
        return "stopped before the first step, and nothing is left behind"
    kept = f"a checkpoint of step {result.saved} is there" if result.saved else "there is no checkpoint yet"
    told = "a checkpoint is saved" if result.saved == result.step else f"{kept}, and what came after it is lost"
    return f"stopped after step {result.step}; {told}"


def _ways_on(result: Result, again: str, finish: str) -> str:
    if result.adapter is not None:
        return f". To make them: {finish}" if result.saved else ""
    ways = [f"to go on: {again}"] if result.step else []
    ways += [f"to end here with the adapter and samples: {finish}"] if result.saved else []
    return "".join(f"\n{way}" for way in ways)


def end(result: Result) -> None:
    """Exits with 1 where files beside the adapter are not what was trained: the adapter itself is there."""
    if result.failed:
        say(f"error: the adapter is written, {result.adapter}; what is to be made of it is not:", err=True)
        for one in result.failed:
            say(f"  {one}", err=True)
        sys.exit(1)


def summary(result: Result) -> None:
    """Prints what a run came to."""
    rows: dict[str, Any] = {"steps": result.step, "loss (last steps)": f"{result.loss:.4f}"}
    rows |= {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in result.figures.items()}
    if result.speed:
        rows |= {"speed": result.speed, "peak memory": f"{result.peak_memory / 2**30:.2f} GiB"}
    samples = result.folder / "samples"
    if samples.is_dir() and any(samples.iterdir()):
        rows["samples"] = samples
    rows |= {"metrics": result.folder / "metrics.jsonl"}
    if result.adapter is not None:
        rows["adapter"] = f"{result.adapter} ({result.adapter.stat().st_size / 1024:.0f} KiB)"
    width = max(map(len, rows))
    for key, value in rows.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        say(f"{key.ljust(width)}  {text}")
