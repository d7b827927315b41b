"""Embedding files: what A1111, ComfyUI and diffusers read as textual inversion.

A file holds the vectors of one string. For one CLIP-L they are under the string itself, as diffusers writes
`learned_embeds.safetensors` (the UIs take the only tensor there is, and go by the file's name); where a pipeline has
other encoders too, under `clip_l`, `clip_g` and `t5xxl`. Read are also `emb_params` and, where pickles are allowed,
A1111's `string_to_param`. A folder is several strings of one adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint import (
    Checkpoint,
    Format,
    OtherReader,
    ReadOptions,
    ReadReport,
    WriteOptions,
    WriteReport,
    single,
)
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit.formats import container
from adapterkit.formats.parts import said_of
from adapterkit.formats.pipeline_parts import candidates, part_of, texts_of
from adapterkit.formats.prefixes import TEXT_1, TEXT_2, TEXT_3
from adapterkit.formats.source import Source
from adapterkit.plugins import get_plugin_manager
from adapterkit.points import InjectionPoint, Points

TYPE, _ROLE = "textual_inversion", "embed.tokens"
KEYS = {TEXT_1: "clip_l", TEXT_2: "clip_g", TEXT_3: "t5xxl"}
_PARTS = {key: part for part, key in KEYS.items()}
_OLD = "string_to_param."
_ALONE = "emb_params"
_NAME = "name"
"""Of the metadata: the string."""
_MOST = 2**13
"""Rows, or numbers of one, beyond which it is something else."""
_LEAST = 4
"""Numbers of a vector below which a tensor of any name is something else."""
_UNFIT = re.compile(r"[^\w.-]+")


class EmbeddingFiles(Format):
    """One file for each string, which the UIs know by the file's name."""

    def recognises(self, source: Source) -> bool:
        files = _files(source)
        return bool(files) and all(_vectors(one) for one in files)

    def read(self, source: Source, points: Points, options: ReadOptions) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        files = _files(source)
        each = {_token(one): {key: _rows(one, name) for key, name in _vectors(one).items()} for one in files}
        matched = [name for one in files for name in _vectors(one).values()]
        counts = {len(rows) for own in each.values() for rows in own.values()}
        keys = {frozenset(own) for own in each.values()}
        if len(each) < len(files) or len(counts) != 1 or len(keys) != 1:
            told = "strings of one adapter are different, with as many vectors each, for the same encoders"
            raise CheckpointError(f"{told}; load them one by one", source.where)
        tensors: dict[str, dict[str, Tensor]] = {}
        lost: list[str] = []
        for key in sorted(keys.pop()):
            values = torch.cat([own[key] for own in each.values()])
            point, first = _place(key, values.shape[1], points)
            if point is None:
                lost += [name for one in files for other, name in _vectors(one).items() if other == key]
            else:
                tensors[point] = {"values": values, "ids": torch.arange(first, first + len(values))}
        config = {"tokens": [*each], "vectors": counts.pop()}
        others = (name for one in files for name in one.entries if name not in matched)
        left = [name for name in others if not name.startswith("string_to")]
        report = ReadReport([name for name in matched if name not in lost], lost, left, fresh=True)
        if not tensors:
            return {}, report
        given = get_plugin_manager().provider("adapter", TYPE)
        settings: dict[str, dict[str, Any]] = {point: {} for point in tensors}
        made = Checkpoint.of(TYPE, config, tensors, settings=settings, distribution=given[0], version=given[1])
        return {"": made}, report

    def place(self, folder: Path, title: str) -> Path:
        return folder

    def write(
        self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions
    ) -> WriteReport:
        tokens, keyed, notes = _said(single(checkpoints, target), points, target)
        count = len(next(iter(keyed.values()))) // len(tokens)
        if len(tokens) > 1 and not target.is_dir():
            told = f"holds one string, and there are {len(tokens)}; make a folder, and give that"
            raise CheckpointError(told, target)
        files = {target / f"{stem_of(token)}.safetensors" if target.is_dir() else target: token for token in tokens}
        if len(files) < len(tokens):
            raise CheckpointError("strings that differ in marks alone would be one file; rename one", target)
        for place, (file, token) in enumerate(files.items()):
            rows = {key: values[place * count : (place + 1) * count] for key, values in keyed.items()}
            named = {token if [*rows] == [KEYS[TEXT_1]] else key: options.cast(own) for key, own in rows.items()}
            container.write(file, named, {_NAME: token})
        return WriteReport(notes)

    def reader(self, model: Any) -> OtherReader | None:
        from adapterkit_textual_inversion.diffusers_reader import reader_of

        return reader_of(model)


def stem_of(token: str) -> str:
    """What the file of a string is called."""
    return _UNFIT.sub("_", token).strip("._-") or "embedding"


def _files(source: Source) -> list[Source]:
    """The files of a folder, or the one file."""
    if not source.is_folder:
        return [source]
    return [source.file(name) for name in source.files if name.endswith(".safetensors")]


def _vectors(source: Source) -> dict[str, str]:
    """Encoder -> name of the tensor that holds its vectors, "" for the only encoder; nothing for other files."""
    entries = {name: entry for name, entry in source.entries.items() if entry.dtype.is_floating_point}
    if not entries or any(len(e.shape) not in (1, 2) or len(e.shape) * e.shape[0] > _MOST for e in entries.values()):
        return {}
    if entries.keys() <= _PARTS.keys():
        return {name: name for name in entries}
    [name, *others] = entries
    told = name == _ALONE or name.startswith(_OLD)
    alone = told or (len(source.entries) == 1 and "." not in name and entries[name].shape[-1] >= _LEAST)
    return {"": name} if alone and not others else {}


def _token(source: Source) -> str:
    """The string, as its key, its metadata or the file's name says."""
    [name, *_] = _vectors(source).values()
    said = source.metadata.get(_NAME)
    if said:
        return said
    return source.name or "<new>" if name in (_ALONE, *_PARTS) or name.startswith(_OLD) else name


def _rows(source: Source, name: str) -> Tensor:
    values = source.tensors([name])[name].float()
    return values[None] if values.ndim == 1 else values


def _place(key: str, width: int, points: Points) -> tuple[str | None, int]:
    """The point of an encoder's embedding, and the first id behind it; None where no encoder has that width."""
    if points.model is None:
        return f"{_ROLE}@{_PARTS.get(key, TEXT_1)}", 0
    found = {point.component: point for point in points if point.role == _ROLE}
    components = points.model.components
    names = candidates(_PARTS[key], components) if key else [one.name for one in texts_of(components)]
    here = [found[name] for name in names if name in found and found[name].out_features == width]
    return (here[0].id, here[0].in_features) if here else (None, 0)


def _said(checkpoint: Checkpoint, points: Points, where: Path) -> tuple[Sequence[str], dict[str, Tensor], list[str]]:
    """The strings, the vectors of all by encoder, and what is to be known of them."""
    if points.model is None:
        raise CheckpointError("the model is needed to name its encoders, and is not at hand", where)
    components, by_id = points.model.components, {point.id: point for point in points}
    tokens: Sequence[str] = ()
    keyed: dict[str, Tensor] = {}
    for id, own in said_of(checkpoint).items():
        if others := [one.type for one in own if one.type != TYPE]:
            raise CheckpointError(f"these files hold new tokens alone, and no {others[0]}; native holds any", where, id)
        point: InjectionPoint = by_id[id]
        part = part_of(components[point.model], components)
        if part not in KEYS or point.role != _ROLE:
            raise CheckpointError("no reader of these files knows such an embedding; native holds any", where, id)
        tokens, keyed[KEYS[part]] = own[0].config["tokens"], own[0].tensors["values"]
        width = point.out_features
        if keyed[KEYS[part]].shape[1] != width:
            raise ShapeMismatchError(
                f"vectors of {keyed[KEYS[part]].shape[1]}, and the embedding has {width}", where, id
            )
    return tokens, keyed, [*_misread(components)]


def _misread(components: Mapping[str, Any]) -> Iterator[str]:
    """Who takes a new token for the end of a text, and so draws something else."""
    for name, one in components.items():
        if part_of(one, components) == TEXT_2 and one.config.get("eos_token_id") == 2:
            end = f"pipe.{name}.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id"
            yield f"diffusers takes the new token for the end of a text in {name}, whose config is an old one: {end}"
