"""`adapterkit adapters`: the adapter types that are installed."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.cli.tables import json_option, show
from adapterkit.plugins import get_plugin_manager
from adapterkit.specs import AdapterSpec


@click.command("adapters")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the adapter types, or just NAME: where each acts and who provides it."""
    manager = get_plugin_manager()
    specs = list(manager.adapters().values()) if name is None else [manager.adapter(name)]
    show([_row(spec) for spec in specs], ("name", "kinds", "summary", "provider"), as_json=as_json)


def _row(spec: AdapterSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "kinds": sorted(spec.kinds),
        "summary": spec.summary,
        "provider": str(spec.origin),
        "target": spec.target,
    }
