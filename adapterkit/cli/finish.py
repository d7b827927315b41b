"""`adapterkit finish`: end a run where it is."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from adapterkit.cli.messages import plain_warnings, say
from adapterkit.cli.processes import is_first


@click.command("finish", epilog="Example: adapterkit finish runs/ink --step 500")
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(1), help="Of which checkpoint. [default: the newest]")
@click.option("--accept-changed-data", is_flag=True, help="The data may be other than the run began with.")
def command(run: Path, step: int | None, accept_changed_data: bool) -> None:
    """Write the adapter, figures and samples of an interrupted run. It can still be resumed."""
    from adapterkit.cli.train import end, loop, summary

    click.get_current_context().with_resource(plain_warnings())
    result = loop().finish(run, step=step, accept_changed_data=accept_changed_data)
    if not is_first():
        sys.exit(result.exit_code)
    if result.exit_code:
        written = f"the adapter is written, {result.adapter}" if result.adapter else "no adapter is written yet"
        say(f"stopped; {written}. To go on: adapterkit finish {run}", err=True)
        sys.exit(result.exit_code)
    summary(result)
    end(result)
