"""AdapterHub's folders: an adapter, a fusion of adapters, a head, or a setup of several.

An adapter is `adapter_config.json` with `adapter.safetensors` or, as a pickle, `pytorch_adapter.bin`; the head of the
model that it was trained on may lie beside it. A fusion has files of its own, and a setup is a folder of such folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adapterkit.checkpoint import Checkpoint, Format, Part, ReadOptions, ReadReport, WriteOptions, WriteReport
from adapterkit.errors import CheckpointError, MissingKeysError, UnsupportedFileError, did_you_mean, shown
from adapterkit.formats import adapterhub_config, adapterhub_fusion
from adapterkit.formats.adapterhub_bottleneck import bottlenecks
from adapterkit.formats.adapterhub_config import Description, Fields
from adapterkit.formats.adapterhub_keys import Keys, parsed
from adapterkit.formats.adapterhub_lora import low_rank
from adapterkit.formats.adapterhub_names import FAMILIES, Family, Places
from adapterkit.formats.adapterhub_read import Reading, prompt
from adapterkit.formats.adapterhub_states import edits, prefixes
from adapterkit.formats.source import Source
from adapterkit.points import Points

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
FUSION_WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
SETUP_FILE = "adapter_setup.json"

_METHODS: Mapping[str, Callable[[Reading, Fields], list[Part]]] = {
    "bottleneck": bottlenecks,
    "lora": low_rank,
    "prefix": prefixes,
    "prompt": prompt,
    "reft": edits,
}


@dataclass(frozen=True)
class AdapterHubReadOptions(ReadOptions):
    """How to read.

    Attributes:
        direft: Whether ReFT without orthonormal rows is DiReFT: the tool does not write what it is.
    """

    direft: bool = False


class AdapterHubFormat(Format):
    """What AdapterHub's `adapters` saves."""

    read_options: ClassVar[type[ReadOptions]] = AdapterHubReadOptions

    def recognises(self, source: Source) -> bool:
        """Whether the configs of a folder are this tool's, or the keys of a file beside such a config."""
        if source.is_folder:
            return any(read(source) is not None for read in (_adapter_of, _fusion_of, _setup_of))
        return any(parsed(key) for key in source.entries) and _adapter_of(source) is not None

    def read(
        self, source: Source, points: Points, options: ReadOptions
    ) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        setup = _setup_of(source)
        if setup is not None:
            raise UnsupportedFileError("is a setup of several adapters", source.where)
        reading, parts, told = self._read_one(source, points, options)
        checkpoints = {"": Checkpoint(parts)} if parts else {}
        return checkpoints, told

    def _read_one(
        self, source: Source, points: Points, options: ReadOptions
    ) -> tuple[Reading, list[Part], ReadReport]:
        direct = isinstance(options, AdapterHubReadOptions) and options.direft
        value = _adapter_of(source)
        if value is not None:
            said = adapterhub_config.described(value, source.where)
            weights = source if not source.is_folder else _weights(source, WEIGHTS)
            reading = _reading(weights, said.model, said.name, points, direct)
            parts = [part for fields in said.methods for part in _METHODS[fields.method](reading, fields)]
            return reading, _kept(parts, points), _report(reading, said)
        value = _fusion_of(source)
        if value is None:
            raise UnsupportedFileError("has no adapter_config.json of AdapterHub", source.where)
        name = adapterhub_config.text_of(value, "name", source.where)
        model = adapterhub_config.text_of(value, "model_type", source.where)
        fields = adapterhub_config.fusion_fields(value, source.where)
        reading = _reading(_weights(source, FUSION_WEIGHTS), model, name, points, direct)
        parts = adapterhub_fusion.fusion(reading, fields, adapterhub_fusion.names_of(value, source.where))
        version = adapterhub_config.text_of(value, "version", source.where)
        said = Description(name, model, adapterhub_config.text_of(value, "model_name", source.where), version, [])
        return reading, _kept(parts, points), _report(reading, said)

    def write(
        self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions
    ) -> WriteReport | None:
        raise UnsupportedFileError("AdapterHub's files are read only; native holds any", target)


def _kept(parts: Sequence[Part], points: Points) -> list[Part]:
    """Those parts that have anything."""
    return [part for part in parts if part.tensors]


def _reading(weights: Source, model: str, name: str, points: Points, direct: bool) -> Reading:
    entries = weights.entries
    paths = [found.path for key in entries if (found := parsed(key))]
    places = Places(_family(model, weights.where), points, paths)
    keys = Keys.sorted_out(entries, name, places)
    again = set(keys.again)
    tensors = weights.tensors([key for key in entries if key not in again])
    return Reading(weights.where, keys, tensors, places, direct)


def _report(reading: Reading, said: Description) -> ReadReport:
    keys = reading.keys
    return ReadReport(
        matched=[*reading.used, *keys.again],
        unmatched=keys.elsewhere,
        left_over=keys.left,
        notes=[*said.notes, *reading.notes],
        tool="AdapterHub adapters",
        version=said.version,
        base=said.base,
    )


def _family(model: str, where: object) -> Family:
    if model not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedFileError(
            f"is for a model of type {shown(model)}; known are {known}.{did_you_mean(model, FAMILIES)}", where, "model_type"
        )
    return FAMILIES[model]


def _weights(source: Source, names: Sequence[str]) -> Source:
    present = [name for name in names if name in source.files]
    if not present:
        raise MissingKeysError(f"has a config and no tensors: {' or '.join(names)} is expected", source.where)
    return source.file(present[0])


def _adapter_of(source: Source) -> Mapping[str, Any] | None:
    return _json(source, adapterhub_config.FILE, adapterhub_config.is_description)


def _fusion_of(source: Source) -> Mapping[str, Any] | None:
    return _json(source, adapterhub_fusion.FILE, lambda value: isinstance(value, Mapping) and "config" in value)


def _setup_of(source: Source) -> Mapping[str, Any] | None:
    return _json(source, SETUP_FILE, lambda value: isinstance(value, Mapping) and "adapter_setup" in value)


def _json(source: Source, name: str, accepts: Callable[[Any], bool]) -> Mapping[str, Any] | None:
    if name not in source.files:
        return None
    value = source.json(name)
    return value if accepts(value) else None
