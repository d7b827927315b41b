"""What `adapterkit train --dry-run` prints: the run as it would be, without reading a weight where that can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from adapterkit.training.run import Run


def show_plan(run: Run) -> None:
    """Looks at data, model and disk, and says what would be trained, on what; the run folder is not touched."""
    from adapterkit.cli.places import show_points
    from adapterkit.training import yaml_values
    from adapterkit.training.plan import plan_of

    plan = plan_of(run)
    click.echo(yaml_values.dump(run.resolved()))
    show_points(plan.points, as_json=False)
    for name, value in plan.facts.items():
        click.echo(f"{name}: {value}")
    for note in plan.record.notes:
        click.echo(f"data: {note}", err=True)
