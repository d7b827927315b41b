"""`adapterkit plugins`: what is installed and what became of it. Works when every plug-in is broken."""

from __future__ import annotations

import traceback
from typing import Any

import click

from adapterkit.cli.tables import json_option, show
from adapterkit.plugins import PluginRecord, get_plugin_manager

_COLUMNS = ("name", "distribution", "version", "status", "provides", "error")


@click.command("plugins")
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of each failure.")
def command(as_json: bool, verbose: bool) -> None:
    """List the plug-ins: who provides each, whether it is active, and if not, why."""
    records = get_plugin_manager().records
    rows = [_row(record) for record in records]
    show(rows if as_json else [_grouped(row) for row in rows], _COLUMNS, as_json=as_json)
    for record in records:
        if verbose and record.error is not None:
            click.echo(f"\n{record.name} ({record.dist} {record.version})", err=True)
            click.echo("".join(traceback.format_exception(record.error)), err=True)


def _row(record: PluginRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "distribution": record.dist,
        "version": record.version,
        "status": record.status,
        "provides": list(record.provides),
        "error": None if record.error is None else str(record.error),
    }


def _grouped(row: dict[str, Any]) -> dict[str, Any]:
    """`["adapter a", "adapter b", "format c"]` as `adapters a, b; formats c`."""
    kinds: dict[str, list[str]] = {}
    for kind, _, name in (item.partition(" ") for item in row["provides"]):
        kinds.setdefault(kind, []).append(name)
    return row | {"provides": "; ".join(f"{kind}s {', '.join(names)}" for kind, names in kinds.items())}
