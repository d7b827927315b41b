"""`adapterkit inspect`: what an adapter file holds, without the model that it is for."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.messages import plain_warnings, say

if TYPE_CHECKING:
    from adapterkit.checkpoint import Checkpoint, ReadReport


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--allow-pickle", is_flag=True, help="Open a pickle of tensors, with torch's weights_only.")
def command(file: Path, as_json: bool, allow_pickle: bool) -> None:
    """Describe an adapter FILE or folder: type, configuration, parameters by role, base, and who wrote it."""
    click.get_current_context().with_resource(plain_warnings())
    report, checkpoints = read_adapters(file, allow_pickle=allow_pickle)
    described = {name: _describe(checkpoint, report, file) for name, checkpoint in checkpoints.items()}
    if as_json:
        click.echo(json.dumps(described.get("", described), indent=2))
        return
    for name, one in described.items():
        if name:
            say(f"-- {_line(name)}")
        _print(one)


def read_adapter(file: Path) -> Checkpoint:
    """The one adapter in a file or folder.

    Raises:
        CheckpointError: No format reads it, or it holds several.
    """
    from adapterkit.formats.registry import only

    return only(read_adapters(file)[1], file)


def read_adapters(file: Path, *, allow_pickle: bool = False) -> tuple[ReadReport, dict[str, Checkpoint]]:
    """What the format of a file or folder says of it, and the adapters by name; "" where there is one without a name.

    Raises:
        CheckpointError: No format reads it.
    """
    from adapterkit.formats.registry import find_format
    from adapterkit.formats.source import Source
    from adapterkit.points import Points

    source = Source.of(file, allow_pickle=allow_pickle)
    reader = find_format(source)
    found, report = reader.read(source, Points([]), reader.reading(strict=False, allow_pickle=allow_pickle))
    return report, found


def _describe(checkpoint: Checkpoint, report: ReadReport, file: Path) -> dict[str, Any]:
    tensors = [t for part in checkpoint.parts for own in part.tensors.values() for t in own.values()]
    return {
        "file": str(file),
        "bytes": _size(file),
        "format": report.format,
        "written by": f"{report.tool} {report.version}".strip(),
        "type": " + ".join(part.type for part in checkpoint.parts),
        "provided by": ", ".join(dict.fromkeys(f"{p.distribution} {p.version}".strip() for p in checkpoint.parts)),
        "config": _config(checkpoint),
        "base": {name: dict(made_for) for name, made_for in checkpoint.base.items()},
        "made for": report.base,
        "backends": dict(checkpoint.backends),
        "metadata": dict(checkpoint.metadata),
        "points with settings": sum(len(part.settings) for part in checkpoint.parts),
        "points": len({key for part in checkpoint.parts for key in part.tensors}),
        "parameters": sum(t.numel() for t in tensors),
        "dtypes": sorted({_dtype(t) for t in tensors}),
        "unknown keys": list(report.left_over),
        "notes": list(report.notes),
        "roles": _roles(checkpoint),
    }


def _size(file: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(f.stat().st_size for f in file.iterdir() if f.is_file()) if file.is_dir() else file.stat().st_size


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config; of an adapter of several types, type -> config."""
    configs = [dict(part.config) for part in checkpoint.parts]
    return configs[0] if len(configs) == 1 else {p.type: one for p, one in zip(checkpoint.parts, configs, strict=True)}


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _roles(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """One entry for each role of each component; points whose tensors have the same shapes are counted together."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for key, tensors in (item for part in checkpoint.parts for item in part.tensors.items()):
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
    width = max(len(_line(key)) for key in plain)
    for key, value in plain.items():
        say(f"{_line(key).ljust(width)}  {_line(_text(value))}")
    click.echo()
    show(described["roles"], ("component", "role", "points", "shapes", "parameters"), as_json=False)


def _line(text: str) -> str:
    """Text of a file as a part of one line: it cannot look like lines of its own."""
    return text.replace("\n", "\\n")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={inner}" for key, inner in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
