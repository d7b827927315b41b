"""`adapterkit plugins`: what is installed and what became of it. Works when every plug-in is broken."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

import click

from adapterkit.cli.tables import json_option, show
from adapterkit.errors import did_you_mean
from adapterkit.plugins.manager import PluginRecord, get_plugin_manager

_COLUMNS = ("name", "distribution", "version", "status", "seconds", "provides", "error")
_COMMANDS = {
    "check": "Run the conformance kit on what is installed under NAME.",
    "new": "Write a complete package for a new plug-in.",
}


class _Commands(click.Group):
    """Imports a command when it is called: the kit takes torch along."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See click. An unknown name is a usage error that lists the near matches."""
        if cmd_name in _COMMANDS:
            return importlib.import_module(f"{__name__}.{cmd_name}").command
        if not ctx.resilient_parsing:
            ctx.fail(f"no such command {cmd_name!r}.{did_you_mean(cmd_name, _COMMANDS)}")
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click. Imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group("plugins", cls=_Commands, invoke_without_command=True)
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of each failure.")
@click.pass_context
def command(ctx: click.Context, as_json: bool, verbose: bool) -> None:
    """List the plug-ins: who provides each, whether it is active, and if not, why."""
    if ctx.invoked_subcommand is not None:
        return
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
        "seconds": round(record.seconds, 3),
        "imports": list(record.heavy),
        "provides": list(record.provides),
        "error": record.slow if record.error is None else str(record.error),
    }


def _grouped(row: dict[str, Any]) -> dict[str, Any]:
    """`["adapter a", "adapter b", "format c"]` as `adapters a, b; formats c`."""
    kinds: dict[str, list[str]] = {}
    for kind, _, name in (item.partition(" ") for item in row["provides"]):
        kinds.setdefault(kind, []).append(name)
    provides = "; ".join(f"{kind}s {', '.join(names)}" for kind, names in kinds.items())
    return row | {"provides": provides, "seconds": f"{row['seconds']:.2f}"}
