"""`adapterkit tasks`: what can be trained, and every key of a run file."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.cli.tables import json_option, show
from adapterkit.plugins import get_plugin_manager
from adapterkit.specs import TaskSpec


@click.command("tasks", epilog="Example: adapterkit tasks diffusion")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the training tasks, or of NAME every key of its run files: type, default and meaning."""
    manager = get_plugin_manager()
    if name is None:
        show([_row(spec) for spec in manager.tasks().values()], ("name", "summary", "provider"), as_json=as_json)
        return
    from adapterkit.cli.keys import COLUMNS, keys_of
    from adapterkit.plugins.manager import class_of
    from adapterkit.training.config import RunConfig
    from adapterkit.training.task import Task

    options = class_of(manager.task(name), Task).Options
    show([*keys_of(RunConfig), *keys_of(options, "options.")], COLUMNS, as_json=as_json)


def _row(spec: TaskSpec) -> dict[str, Any]:
    return {"name": spec.name, "summary": spec.summary, "provider": str(spec.origin), "target": spec.target}
