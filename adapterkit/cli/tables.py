"""How commands print: a table for people, JSON for machines. Results go to stdout, messages to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from adapterkit.errors import printable

Row = Mapping[str, Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def show(rows: Sequence[Row], columns: Sequence[str], *, as_json: bool, empty: str = "nothing") -> None:
    """Print rows.

    Args:
        rows: One mapping per row; JSON keeps every key.
        columns: The keys that the table shows, in order.
        as_json: Whether to print JSON.
        empty: What the table's place says where there are no rows.
    """
    if as_json:
        click.echo(json.dumps([dict(row) for row in rows], indent=2))
    elif not rows:
        click.echo(empty)
    else:
        _show_table(rows, columns)


def _show_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*(Text(printable(_cell(row[column]))) for column in columns))
    # A pipe has no width of its own, and rich would wrap at 80.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
