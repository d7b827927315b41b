"""Writing of AdapterHub's folders: one adapter, a fusion, or several in a setup."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from adapterkit.adapter import AdapterConfig
from adapterkit.checkpoint import Checkpoint, WriteOptions, WriteReport
from adapterkit.contract.codec import Said
from adapterkit.errors import CheckpointError
from adapterkit.formats import adapterhub_config, adapterhub_fusion, adapterhub_heads, container
from adapterkit.formats.adapterhub_write_bottleneck import accepted, bottlenecks, invertible
from adapterkit.formats.adapterhub_write_fusion import fusion, heads
from adapterkit.formats.adapterhub_write_lora import low_rank
from adapterkit.formats.adapterhub_write_states import edits, prefixes, prompt
from adapterkit.formats.adapterhub_writing import VERSION, Child, Writing, begun
from adapterkit.formats.files import make_folder, write_atomically, write_folder
from adapterkit.formats.parts import said_of, shared_of
from adapterkit.plugins.manager import class_of, get_plugin_manager
from adapterkit.points import Points

SETUP_FILE = "adapter_setup.json"
_FUSE, _HEAD = "fuse", "trainable"
_BOTTLENECKS = ("bottleneck", "compacter")
_LOW_RANK = ("lora", "dora", "ia3", "union")
_OTHERS: Mapping[str, Callable[[Writing, Mapping[str, Said]], list[Child]]] = {
    "prefix": prefixes,
    "prompt": prompt,
    "reft": edits,
}
_KNOWN = (*_BOTTLENECKS, *_LOW_RANK, *_OTHERS, "invertible", _HEAD)

Group = Mapping[str, Said]
"""Point id -> what is there of one type."""


@dataclass
class Folder:
    """What is written into one folder.

    Attributes:
        files: By name: JSON objects, and tensors by key.
        notes: For the report.
        name: Its own, where that is not the adapter's.
    """

    files: dict[str, Mapping[str, Any] | Mapping[str, Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str = ""


def write_adapters(
    checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions
) -> WriteReport:
    """See `Format.write`. Nothing is written before all of it can be."""
    alone = len(checkpoints) == 1 and not all(checkpoints)
    names = {name: _safe(name or target.name) for name in checkpoints}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"these names are one to AdapterHub: {', '.join(names)}", target)
    groups = {name: _groups(checkpoint) for name, checkpoint in checkpoints.items()}
    made = {name: _folder(checkpoint, names, name, groups, points, target) for name, checkpoint in checkpoints.items()}
    notes = [note for one in made.values() for note in one.notes]
    if alone:
        _put(target, next(iter(made.values())), options)
        return WriteReport(list(dict.fromkeys(notes)))
    setup = _setup({names[name]: group for name, group in groups.items()}, names)
    make_folder(target)
    for name, folder in made.items():
        _put(target / (folder.name or names[name]), folder, options)
    write_atomically(target / SETUP_FILE, json.dumps(setup, indent=2).encode())
    return WriteReport(list(dict.fromkeys(notes)))


def _safe(name: str) -> str:
    """A name that can stand in a key and be a folder's."""
    return re.sub(r"[^\w-]", "_", name) or "adapter"


def _put(path: Path, folder: Folder, options: WriteOptions) -> None:
    contents: dict[str, Sequence[bytes | memoryview]] = {}
    for name, content in folder.files.items():
        if name.endswith(".json"):
            contents[name] = [json.dumps(content, indent=2).encode()]
        else:
            tensors = {key: options.cast(tensor) for key, tensor in content.items()}
            contents[name] = container.pieces(path / name, tensors, {"format": "pt"})
    write_folder(path, contents)


# -- one adapter ------------------------------------------------------------------------------------------------------


def _groups(checkpoint: Checkpoint) -> dict[str, dict[str, Said]]:
    """What an adapter is, by type and point, every config with all of its fields."""
    found: dict[str, dict[str, Said]] = {}
    for id, own in said_of(checkpoint).items():
        for one in own:
            inside = found.setdefault(one.type, {})
            if id in inside:
                raise CheckpointError(f"has {one.type} twice at {id}, and AdapterHub once; native holds any", None, id)
            inside[id] = Said(one.type, _whole(one), one.tensors)
    return found


def _whole(one: Said) -> Mapping[str, Any]:
    specs = get_plugin_manager().adapters()
    if one.type not in specs or one.type == "union":
        return one.config
    return class_of(specs[one.type], AdapterConfig).from_dict(dict(one.config)).to_dict()


def _folder(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    name: str,
    groups: Mapping[str, Mapping[str, Group]],
    points: Points,
    target: Path,
) -> Folder:
    own = groups[name]
    ids = [id for group in own.values() for id in group]
    if _FUSE in own:
        return _fusion(own, names, names[name], groups, begun("", points, ids, target))
    writing = begun(names[name], points, ids, target)
    if strange := sorted(set(own) - set(_KNOWN)):
        raise writing.refused(f"has no method for {', '.join(strange)}")
    folder, children = Folder(), _children(writing, own, shared_of(checkpoint))
    if children:
        configs = [child.json() for child in children]
        config = configs[0]
        if len(configs) > 1:
            config = {"architecture": "union", "configs": configs}
        about = {**writing.about(), "config": config, "name": writing.name}
        folder.files[adapterhub_config.FILE] = dict(sorted(about.items()))
        folder.files["adapter.safetensors"] = writing.tensors
    if _HEAD in own:
        about, tensors = heads(writing, own[_HEAD])
        folder.files |= {adapterhub_heads.FILE: dict(sorted(about.items())), adapterhub_heads.WEIGHTS[0]: tensors}
    folder.notes = writing.notes
    return folder


def _children(writing: Writing, own: Mapping[str, Group], shared: Mapping[str, Mapping[str, Tensor]]) -> list[Child]:
    prefix = prefixes(writing, own["prefix"]) if "prefix" in own else []
    networks = {id: one for type in _BOTTLENECKS for id, one in own.get(type, {}).items()}
    if len(networks) < sum(len(own.get(type, {})) for type in _BOTTLENECKS):
        raise writing.refused("has one bottleneck at a point, and there are two")
    middle = bottlenecks(writing, networks, shared.get("compacter", {})) if networks else []
    if "invertible" in own:
        middle += invertible(writing, own["invertible"], shared["invertible"], middle)
    accepted(writing, middle)
    thin = {id: one for type in _LOW_RANK for id, one in own.get(type, {}).items()}
    if len(thin) < sum(len(own.get(type, {})) for type in _LOW_RANK):
        raise writing.refused("has one of LoRA's kind at a point, and there are two")
    low = low_rank(writing, thin) if thin else []
    others = [child for type in ("reft", "prompt") if type in own for child in _OTHERS[type](writing, own[type])]
    return [*prefix, *middle, *low, *others]


def _fusion(
    own: Mapping[str, Group],
    names: Mapping[str, str],
    name: str,
    groups: Mapping[str, Mapping[str, Group]],
    writing: Writing,
) -> Folder:
    said = {
        id: Said(
            one.type,
            {**one.config, "parts": [names.get(part, _safe(part)) for part in one.config["parts"]]},
            one.tensors,
        )
        for id, one in own[_FUSE].items()
    }
    if len(own) > 1:
        raise writing.refused("keeps a fusion in a folder of its own, and this adapter has more")
    parts = next(iter(own[_FUSE].values())).config["parts"]
    last = groups.get(parts[-1])
    inside = None if last is None else {id: one for group in last.values() for id, one in group.items()}
    writing.name = ",".join(names.get(part, _safe(part)) for part in parts)
    about = fusion(writing, said, inside)
    files = {adapterhub_fusion.FILE: dict(sorted(about.items())), "model_adapter_fusion.safetensors": writing.tensors}
    return Folder(files, writing.notes, writing.name)


# -- several ----------------------------------------------------------------------------------------------------------


def _setup(groups: Mapping[str, Mapping[str, Group]], names: Mapping[str, str]) -> dict[str, Any]:
    """The setup of a folder of several: a stack of all, but for the parts of a fusion, which are in it."""
    blocks: list[Mapping[str, Any]] = []
    inside: set[str] = set()
    for own in groups.values():
        if _FUSE in own:
            parts = [names.get(part, _safe(part)) for part in next(iter(own[_FUSE].values())).config["parts"]]
            blocks.append({"type": "Fuse", "children": [_single(part) for part in parts]})
            inside |= set(parts)
    rest = [_single(name) for name, own in groups.items() if _FUSE not in own and name not in inside]
    every = [*rest, *blocks]
    only = every[0] if len(every) == 1 and every[0]["type"] != "single" else {"type": "Stack", "children": every}
    return {"adapter_setup": only, "head_setup": None, "version": VERSION}


def _single(name: str) -> dict[str, Any]:
    return {"type": "single", "children": [name]}
