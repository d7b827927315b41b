"""`adapterkit backends`: the model families that are known."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.cli.tables import json_option, show
from adapterkit.plugins import get_plugin_manager
from adapterkit.specs import BackendSpec


@click.command("backends")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the model families, or just NAME: the classes that each covers and who provides it."""
    manager = get_plugin_manager()
    specs = list(manager.backends().values()) if name is None else [manager.backend(name)]
    show([_row(spec) for spec in specs], ("name", "models", "extra", "provider"), as_json=as_json)


def _row(spec: BackendSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "models": list(spec.models),
        "extra": spec.extra,
        "summary": spec.summary,
        "provider": str(spec.origin),
        "target": spec.target,
    }
