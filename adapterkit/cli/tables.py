"""How commands print: a table for people, JSON for machines. Results go to stdout, messages to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from adapterkit.errors import printable

Row = Mapping[str, Any]
_PIPE = 160
"""Columns of output that goes to no terminal."""

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
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*(Text(printable(_cell(row[column]))) for column in columns))
    # A pipe has no width of its own, and rich would wrap at 80.
    console = Console(width=None if sys.stdout.isatty() else _PIPE)
    if Measurement.get(console, console.options.update(width=_PIPE), table).minimum <= console.width:
        console.print(table)
    else:
        console.print(_stacked(rows, columns))


def _stacked(rows: Sequence[Row], columns: Sequence[str]) -> Any:
    """Row by row, for terminals that are too narrow to have the columns side by side without breaking words."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    lines: list[Any] = []
    for row in rows:
        lines.append(Text(printable(_cell(row[columns[0]])), style="bold", overflow="fold"))
        told = [(column, printable(text)) for column in columns[1:] if (text := _cell(row[column]))]
        lines += [Padding(Text(f"{column}: {text}", overflow="fold"), (0, 0, 0, 2)) for column, text in told]
    return Group(*lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
