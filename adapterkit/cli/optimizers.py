"""`adapterkit optimizers`: what changes the parameters, how the learning rate goes on, and the keys of each."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.cli.tables import json_option, show
from adapterkit.plugins import get_plugin_manager
from adapterkit.specs import Spec


@click.command("optimizers", epilog="Example: adapterkit optimizers cosine")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List optimizers and schedules, or of NAME, one of them, every key: type, default and meaning."""
    manager = get_plugin_manager()
    optimizers, schedules = manager.optimizers(), manager.schedules()
    if name is None:
        rows = [_row("optimizer", spec) for spec in optimizers.values()]
        rows += [_row("scheduler", spec) for spec in schedules.values()]
        show(rows, ("name", "key", "summary", "provider"), as_json=as_json)
        return
    from adapterkit.cli.keys import COLUMNS, keys_of
    from adapterkit.plugins.manager import class_of
    from adapterkit.training.optimizer import OptimizerConfig
    from adapterkit.training.schedule import ScheduleConfig

    if name in schedules:
        show(keys_of(class_of(manager.schedule(name), ScheduleConfig), "scheduler."), COLUMNS, as_json=as_json)
    else:
        show(keys_of(class_of(manager.optimizer(name), OptimizerConfig), "optimizer."), COLUMNS, as_json=as_json)


def _row(key: str, spec: Spec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "key": key,
        "summary": getattr(spec, "summary", ""),
        "provider": str(spec.origin),
        "target": spec.target,
    }
