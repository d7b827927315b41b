"""`adapterkit inspect`: what an adapter file holds, without the model that it is for."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from adapterkit.checkpoint import Checkpoint


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file: Path, as_json: bool) -> None:
    """Describe an adapter FILE: type, configuration, parameters by role, base, and who wrote it."""
    from adapterkit.cli.messages import plain_warnings

    click.get_current_context().with_resource(plain_warnings())
    format_name, checkpoints = read_adapters(file)
    described = {name: _describe(checkpoint, format_name, file) for name, checkpoint in checkpoints.items()}
    if as_json:
        click.echo(json.dumps(described.get("", described), indent=2))
        return
    for name, one in described.items():
        click.echo(f"-- {name}\n" if name else "", nl=False)
        _print(one)


def read_adapter(file: Path) -> tuple[str, Checkpoint]:
    """The name of the file's format, and the one adapter in it.

    Raises:
        CheckpointError: No format reads it, or it holds several.
    """
    from adapterkit.errors import UnsupportedFileError

    name, found = read_adapters(file)
    if len(found) != 1:
        raise UnsupportedFileError(f"holds several adapters ({', '.join(found)}); Adapters.load_all() reads them", file)
    return name, next(iter(found.values()))


def read_adapters(file: Path) -> tuple[str, dict[str, Checkpoint]]:
    """The name of the file's format, and the adapters in it by name; "" where there is one without a name.

    Raises:
        CheckpointError: No format reads it.
    """
    from adapterkit.formats.registry import find_format
    from adapterkit.points import Points

    reader = find_format(file)
    return reader.spec.name, reader.read_many(file, Points([]))


def _describe(checkpoint: Checkpoint, format_name: str, file: Path) -> dict[str, Any]:
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "format": format_name,
        "type": checkpoint.type,
        "provided by": f"{checkpoint.distribution} {checkpoint.version}".strip(),
        "config": dict(checkpoint.config),
        "base": {name: dict(made_for) for name, made_for in checkpoint.base.items()},
        "backends": dict(checkpoint.backends),
        "metadata": dict(checkpoint.metadata),
        "points": len(checkpoint.tensors),
        "parameters": sum(t.numel() for tensors in checkpoint.tensors.values() for t in tensors.values()),
        "dtypes": sorted({_dtype(t) for tensors in checkpoint.tensors.values() for t in tensors.values()}),
        "roles": _roles(checkpoint),
    }


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _roles(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """One entry for each role of each component; points whose tensors have the same shapes are counted together."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for key, tensors in checkpoint.tensors.items():
        role, _, place = key.partition("@")
        shapes = ", ".join(f"{name} {'x'.join(map(str, t.shape)) or 'scalar'}" for name, t in sorted(tensors.items()))
        groups[place.partition(".")[0], role, shapes].append(sum(t.numel() for t in tensors.values()))
    return [
        {"component": component, "role": role, "points": len(sizes), "shapes": shapes, "parameters": sum(sizes)}
        for (component, role, shapes), sizes in sorted(groups.items())
    ]


def _print(described: dict[str, Any]) -> None:
    from adapterkit.cli.tables import show

    plain = {key: value for key, value in described.items() if key not in ("roles", "base") and value}
    plain |= {f"base {name}": made_for for name, made_for in described["base"].items()}
    plain["bytes"] = f"{described['bytes']:,}"
    plain["parameters"] = f"{described['parameters']:,}"
    width = max(map(len, plain))
    for key, value in plain.items():
        click.echo(f"{key.ljust(width)}  {_text(value)}")
    click.echo()
    show(described["roles"], ("component", "role", "points", "shapes", "parameters"), as_json=False)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={inner}" for key, inner in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
