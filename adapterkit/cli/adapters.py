"""`adapterkit adapters`: the adapter types that are installed."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.cli.tables import json_option, show
from adapterkit.plugins import get_plugin_manager
from adapterkit.specs import AdapterSpec


@click.command("adapters", epilog="Example: adapterkit adapters lora")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the adapter types, or of NAME where it acts, who provides it, and every field of its configuration."""
    manager = get_plugin_manager()
    columns = ("name", "kinds", "summary", "provider")
    if name is None:
        show([_row(spec) for spec in manager.adapters().values()], columns, as_json=as_json)
        return
    from adapterkit.adapter import AdapterConfig
    from adapterkit.cli.keys import COLUMNS, description_of, keys_of
    from adapterkit.plugins.manager import class_of

    spec = manager.adapter(name)
    config = class_of(spec, AdapterConfig)
    fields = keys_of(config)
    show([{**_row(spec), "fields": fields} if as_json else _row(spec)], columns, as_json=as_json)
    if not as_json:
        click.echo(f"\n{description_of(config)}\n")
        show(fields, COLUMNS, as_json=False)


def _row(spec: AdapterSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "kinds": sorted(spec.kinds),
        "summary": spec.summary,
        "provider": str(spec.origin),
        "target": spec.target,
    }
