"""`adapterkit verify`: whether other libraries make the same of an adapter's file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from adapterkit.cli.adapter_files import file_type, pickle_option
from adapterkit.cli.messages import plain_warnings, say


@click.command("verify", epilog="Example: adapterkit verify style.safetensors --base ./model")
@click.argument("file", type=file_type)
@click.option(
    "--base", required=True, metavar="MODEL", help="The model that it is for, a folder: its weights are loaded."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pickle_option
def command(file: Path, base: str, as_json: bool, allow_pickle: bool) -> None:
    """Load the adapter in FILE with the other libraries that are installed, and compare what every layer computes.

    The exit code is 1 where one does otherwise.
    """
    click.get_current_context().with_resource(plain_warnings())
    from adapterkit.tools.verify import verify

    found = verify(file, base, allow_pickle=allow_pickle)
    if as_json:
        click.echo(json.dumps([{**vars(one), "agrees": one.agrees} for one in found], indent=2))
    for one in [] if as_json else found:
        given = f"{one.library}, given {one.format}"
        if one.problem:
            say(f"{given}: cannot be compared: {one.problem}")
        elif one.agrees:
            say(f"{given}: equal outputs of {one.layers} layers, of which {one.changed} are changed ({one.error:.1e})")
        else:
            say(f"{given}: differs by {one.error:.2g} of the largest output at {one.where}")
    if not all(one.agrees for one in found):
        sys.exit(1)
