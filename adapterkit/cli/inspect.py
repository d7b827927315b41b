"""`adapterkit inspect`: what an adapter file holds, without the model that it is for; with it, more."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.adapter_files import base_option, file_type, new_type, one_thread, pickle_option, points_of
from adapterkit.cli.messages import plain_warnings, say

if TYPE_CHECKING:
    from adapterkit.checkpoint import Checkpoint
    from adapterkit.tools.describe import Facts
    from adapterkit.tools.files import Loaded

_BLOCKS = 12
_ENOUGH = 0.1


@click.command("inspect", epilog="Example: adapterkit inspect style.safetensors --base ./model --plot style.png")
@click.argument("file", type=file_type)
@base_option
@click.option("--plot", type=new_type, help="Draw norms by block and role, spectra, and errors of ranks: style.png.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--full", is_flag=True, help="With --json: every point, with its singular values.")
@pickle_option
def command(file: Path, base: str | None, plot: Path | None, as_json: bool, full: bool, allow_pickle: bool) -> None:
    """Describe an adapter FILE or folder: types, ranks, norms by block and role, base, tools that can read it."""
    click.get_current_context().with_resource(plain_warnings())
    click.get_current_context().with_resource(one_thread())
    from adapterkit.tools.files import read

    loaded = read(file, points_of(base), strict=False, allow_pickle=allow_pickle)
    found = {name: _found(checkpoint, loaded) for name, checkpoint in loaded.adapters.items()}
    described = {
        name: _described(checkpoint, loaded, found[name], file, full) for name, checkpoint in loaded.adapters.items()
    }
    if plot is not None:
        _plot(found, plot, file)
    if as_json:
        click.echo(json.dumps(described.get("", described), indent=2))
        return
    for name, one in described.items():
        if name:
            say(f"-- {_line(name)}")
        _print(one)


def _found(checkpoint: Checkpoint, loaded: Loaded) -> Facts | str:
    """What the adapter does; or why nobody can tell: its type is not installed, for example."""
    from adapterkit.errors import AdapterKitError
    from adapterkit.tools.describe import describe

    try:
        return describe(checkpoint, loaded.points, loaded.where)
    except AdapterKitError as error:
        return str(error)


def _plot(found: dict[str, Facts | str], target: Path, file: Path) -> None:
    from adapterkit.tools.plot import plot

    for name, facts in found.items():
        if isinstance(facts, str):
            raise click.UsageError(f"--plot: {facts}")
        plot(
            facts,
            target if len(found) == 1 else target.with_stem(f"{target.stem}_{name}"),
            f"{file.name} {name}".strip(),
        )


def _described(checkpoint: Checkpoint, loaded: Loaded, facts: Facts | str, file: Path, full: bool) -> dict[str, Any]:
    from adapterkit.tools.readers import verdicts

    told = verdicts(checkpoint, loaded.report.format, loaded.points)
    whole = _describe(checkpoint, loaded, file)
    whole |= {"effect unknown": facts} if isinstance(facts, str) else _effect(facts, full)
    return {
        **whole,
        "can be written as": [name for name, verdict in told.items() if not verdict.reason],
        "cannot be written as": {n: verdict.reason for n, verdict in told.items() if verdict.reason and verdict.asked},
        "with --base perhaps as": [name for name, verdict in told.items() if not verdict.asked],
        "readers must know": {name: list(verdict.notes) for name, verdict in told.items() if verdict.notes},
        "roles": _roles(checkpoint, facts),
        "blocks": _blocks(facts),
    }


def _effect(facts: Facts, full: bool) -> dict[str, Any]:
    from adapterkit.tools.describe import energy_ranks
    from adapterkit.tools.ranks import rank_errors, recommended

    spectra = facts.spectra
    energy = {
        f"{share:.0%}": [min(own), sorted(own)[len(own) // 2], max(own)]
        for share, own in energy_ranks(spectra).items()
        if own
    }
    values = {
        "ranks": facts.ranks,
        "alphas": facts.alphas,
        "scales": facts.scales,
        "norm": facts.norm,
        "not known": facts.unknown,
        "ranks for energy": energy,
        "rank errors": [vars(row) for row in rank_errors(spectra)],
        "enough": recommended(spectra, _ENOUGH)[0] if spectra else None,
    }
    return {**values, "each point": [_point(point) for point in facts.points]} if full else values


def _point(point: Any) -> dict[str, Any]:
    own = {name: value for name, value in vars(point).items() if name != "spectrum"}
    values = [] if point.spectrum is None else point.spectrum.values.tolist()
    return {**own, "singular values": values}


def _describe(checkpoint: Checkpoint, loaded: Loaded, file: Path) -> dict[str, Any]:
    from adapterkit.tools.describe import trigger_words

    report = loaded.report
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
        "trigger words": trigger_words(checkpoint.metadata),
        "metadata": dict(checkpoint.metadata),
        "points with settings": sum(len(part.settings) for part in checkpoint.parts),
        "points": len({key for part in checkpoint.parts for key in part.tensors}),
        "parameters": sum(t.numel() for t in tensors),
        "dtypes": sorted({_dtype(t) for t in tensors}),
        "unknown keys": list(report.left_over),
        "keys of no point": list(report.unmatched),
        "notes": list(report.notes),
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


def _roles(checkpoint: Checkpoint, facts: Facts | str) -> list[dict[str, Any]]:
    """One entry for each role of each component; points whose tensors have the same shapes are counted together."""
    from adapterkit.tools.places import places

    tensors = {key: own for part in checkpoint.parts for key, own in part.tensors.items()}
    where, norms = places(tensors), {} if isinstance(facts, str) else facts.norms
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for key, own in tensors.items():
        shapes = ", ".join(f"{name} {'x'.join(map(str, t.shape)) or 'scalar'}" for name, t in sorted(own.items()))
        groups[where[key].component, where[key].role, shapes].append(key)
    return [
        {
            "component": component,
            "role": role,
            "points": len(keys),
            "shapes": shapes,
            "parameters": sum(t.numel() for key in keys for t in tensors[key].values()),
            "norm": _norm(keys, norms),
        }
        for (component, role, shapes), keys in sorted(groups.items())
    ]


def _blocks(facts: Facts | str) -> list[dict[str, Any]]:
    """One entry for each block, in order."""
    if isinstance(facts, str):
        return []
    from adapterkit.tools.places import in_order, places

    where, groups = places(facts.norms), defaultdict[tuple[str, str], list[str]](list)
    for key in facts.norms:
        groups[where[key].component, where[key].block].append(key)
    return [
        {
            "component": component,
            "block": block,
            "points": len(groups[component, block]),
            "norm": _norm(groups[component, block], facts.norms),
        }
        for component in sorted({component for component, _ in groups})
        for block in in_order(block for own, block in groups if own == component)
    ]


def _norm(keys: list[str], norms: Any) -> float | None:
    """Of all that is added at some points; None where that is not known."""
    known = [norms[key] for key in keys if key in norms]
    return sum(norm**2 for norm in known) ** 0.5 if known else None


_TABLES = ("roles", "blocks", "base", "rank errors", "readers must know", "each point")


def _print(described: dict[str, Any]) -> None:
    from adapterkit.cli.tables import show
    from adapterkit.mapping.targets import some

    plain = {key: value for key, value in described.items() if key not in _TABLES and value}
    plain |= {f"base {name}": made_for for name, made_for in described["base"].items()}
    plain |= {f"{name} readers must know": notes for name, notes in described["readers must know"].items()}
    for name in ("ranks", "alphas", "scales", "not known"):
        if name in plain:
            plain[name] = ", ".join(f"{value} at {count} points" for value, count in plain[name].items())
    if "ranks for energy" in plain:
        told = {
            share: str(low) if low == high else f"{low} to {high}, mostly {half}"
            for share, (low, half, high) in plain["ranks for energy"].items()
        }
        plain["ranks for energy"] = told
    for name in ("unknown keys", "keys of no point"):
        if name in plain:
            plain[name] = f"{len(described[name]):,}: {some(described[name])}"
    plain["bytes"] = f"{described['bytes']:,}"
    plain["parameters"] = f"{described['parameters']:,}"
    if "norm" in plain:
        plain["norm"] = f"{described['norm']:.4g}"
    if "enough" in plain:
        plain["enough"] = f"rank {described['enough']} for an error of {_ENOUGH:g} of the norm"
    width = max(len(_line(key)) for key in plain)
    for key, value in plain.items():
        say(f"{_line(key).ljust(width)}  {_line(_text(value))}")
    click.echo()
    show(_rounded(described["roles"]), ("component", "role", "points", "shapes", "parameters", "norm"), as_json=False)
    strongest = sorted(described["blocks"], key=lambda row: -row["norm"])[:_BLOCKS]
    if len(described["blocks"]) > 1:
        click.echo()
        show(_rounded(strongest), ("component", "block", "points", "norm"), as_json=False)
    if len(described["blocks"]) > _BLOCKS:
        say(f"... and {len(described['blocks']) - _BLOCKS} weaker blocks; --json has them all")


def _rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "norm": None if row["norm"] is None else f"{row['norm']:.4g}"} for row in rows]


def _line(text: str) -> str:
    """Text of a file as a part of one line: it cannot look like lines of its own."""
    return text.replace("\n", "\\n")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={inner}" for key, inner in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
