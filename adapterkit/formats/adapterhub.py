"""AdapterHub's folders: an adapter, a fusion of adapters, a head, or a setup of several.

An adapter is `adapter_config.json` with `adapter.safetensors` or, as a pickle, `pytorch_adapter.bin`; the head of the
model that it was trained on may lie beside it. A fusion has files of its own, and a setup is a folder of such folders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from adapterkit.checkpoint import Checkpoint, Format, Part, ReadOptions, ReadReport, WriteOptions, WriteReport
from adapterkit.errors import InvalidHeaderError, MissingKeysError, UnsupportedFileError, did_you_mean, shown
from adapterkit.formats import adapterhub_config, adapterhub_fusion, adapterhub_heads
from adapterkit.formats.adapterhub_bottleneck import bottlenecks
from adapterkit.formats.adapterhub_config import Fields, text_of
from adapterkit.formats.adapterhub_keys import Keys, parsed
from adapterkit.formats.adapterhub_lora import low_rank
from adapterkit.formats.adapterhub_names import FAMILIES, Family, Places
from adapterkit.formats.adapterhub_read import Reading, prompt
from adapterkit.formats.adapterhub_states import edits, prefixes
from adapterkit.formats.adapterhub_write import SETUP_FILE, write_adapters
from adapterkit.formats.source import Source
from adapterkit.points import Points

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
FUSION_WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
_MOST = 64
_DEPTH = 8

_METHODS: Mapping[str, Callable[[Reading, Fields], list[Part]]] = MappingProxyType(
    {"bottleneck": bottlenecks, "lora": low_rank, "prefix": prefixes, "prompt": prompt, "reft": edits}
)
_TOOL = "AdapterHub adapters"


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
        if not source.is_folder:
            return any(parsed(key) for key in source.entries) and _adapter_of(source) is not None
        return any(read(source) is not None for read in (_adapter_of, _fusion_of, _setup_of, _head_of))

    def read(self, source: Source, points: Points, options: ReadOptions) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        """The adapter of a folder, or all of a setup; `points` of the model decide what its keys mean.

        Raises:
            InvalidHeaderError: A config has a wrong field.
            UnsupportedFileError: It asks for what no type computes, or is for a model that is not known.
            MissingKeysError, ShapeMismatchError, BaseMismatchError: The tensors are not those that it asks for.
        """
        setup = _setup_of(source) if source.is_folder else None
        if setup is None:
            parts, report = _read_one(source, points, options)
            return ({"": Checkpoint(parts)} if parts else {}), report
        found: dict[str, Checkpoint] = {}
        reports: list[ReadReport] = []
        for folder in _folders(setup, source.where):
            parts, report = _read_one(source.file(folder), points, options)
            reports.append(report)
            if parts:
                found[_name(folder, found)] = Checkpoint(parts)
        return found, _joined(reports, f"the setup is {_told(setup['adapter_setup'])}: activate() makes it act")

    def place(self, folder: Path, title: str) -> Path:
        return folder

    def write(
        self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions
    ) -> WriteReport | None:
        return write_adapters(checkpoints, target, points, options)


def _read_one(source: Source, points: Points, options: ReadOptions) -> tuple[list[Part], ReadReport]:
    """The parts in one folder, or in a file beside its config."""
    parts: list[Part] = []
    report = ReadReport(tool=_TOOL)
    if (value := _adapter_of(source)) is not None:
        parts, report = _adapter(source, value, points, options)
    elif (value := _fusion_of(source)) is not None:
        return _fusion(source, value, points)
    head = _head_of(source) if source.is_folder else None
    weights = None if head is None else _weights(source, adapterhub_heads.WEIGHTS, expected=value is None)
    if head is None or weights is None:
        return parts, report
    own = adapterhub_heads.head_of(weights, points, [key for part in parts for key in part.tensors])
    version = report.version or text_of(head, "version", source.where)
    matched = [*report.matched, *own.matched]
    unmatched, notes = [*report.unmatched, *own.unmatched], [*report.notes, *own.notes]
    told = dataclasses.replace(report, matched=matched, unmatched=unmatched, notes=notes, version=version)
    return [*parts, *own.parts], told


def _adapter(
    source: Source, value: Mapping[str, Any], points: Points, options: ReadOptions
) -> tuple[list[Part], ReadReport]:
    said = adapterhub_config.described(value, source.where)
    weights = _weights(source, WEIGHTS) if source.is_folder else source
    assert weights is not None
    reading = _reading(weights, said.model, said.name, points)
    reading.direct = isinstance(options, AdapterHubReadOptions) and options.direft
    reading.inverts = said.inverts or reading.places.family.hooked
    parts = [part for fields in said.methods for part in _METHODS[fields.method](reading, fields)]
    return parts, _report(reading, said.version, said.base, said.notes)


def _fusion(source: Source, value: Mapping[str, Any], points: Points) -> tuple[list[Part], ReadReport]:
    where = source.where
    fields = adapterhub_config.fusion_fields(value, where)
    weights = _weights(source, FUSION_WEIGHTS)
    assert weights is not None
    reading = _reading(weights, text_of(value, "model_type", where), text_of(value, "name", where), points)
    parts = adapterhub_fusion.fusion(reading, fields, adapterhub_fusion.names_of(value, where))
    return parts, _report(reading, text_of(value, "version", where), text_of(value, "model_name", where))


def _reading(weights: Source, model: str, name: str, points: Points) -> Reading:
    entries = weights.entries
    paths = [found.path for key in entries if (found := parsed(key))]
    places = Places(_family(model, weights.where), points, paths)
    keys = Keys.sorted_out(entries, name, places)
    tensors = weights.tensors(set(entries) - set(keys.again))
    return Reading(weights.where, keys, tensors, places)


def _report(reading: Reading, version: str, base: str, notes: Sequence[str] = ()) -> ReadReport:
    keys = reading.keys
    matched, told = [*reading.used, *keys.again], [*notes, *reading.notes]
    known = {*matched, *keys.elsewhere}
    left = [key for key in reading.tensors if key not in known]  # those at a place that nobody has asked for, too
    made_for = f"{base} ({adapterhub_config.FILE})" if base else ""
    return ReadReport(matched, keys.elsewhere, left, told, _TOOL, version, made_for)


def _family(model: str, where: object) -> Family:
    if model not in FAMILIES:
        near = did_you_mean(model, FAMILIES)
        told = f"is for a model of type {shown(model)}, which is not known ({', '.join(FAMILIES)}).{near}"
        raise UnsupportedFileError(told, where, "model_type")
    return FAMILIES[model]


def _weights(source: Source, names: Sequence[str], *, expected: bool = True) -> Source | None:
    present = [name for name in names if name in source.files]
    if not present and expected:
        raise MissingKeysError(f"has a config and no tensors: {' or '.join(names)} is expected", source.where)
    return source.file(present[0]) if present else None


# -- which files there are --------------------------------------------------------------------------------------------


def _adapter_of(source: Source) -> Mapping[str, Any] | None:
    return _json(source, adapterhub_config.FILE, adapterhub_config.is_description)


def _fusion_of(source: Source) -> Mapping[str, Any] | None:
    return _json(source, adapterhub_fusion.FILE, lambda value: "config" in value)


def _head_of(source: Source) -> Mapping[str, Any] | None:
    return _json(source, adapterhub_heads.FILE, lambda value: "model_class" in value)


def _setup_of(source: Source) -> Mapping[str, Any] | None:
    return _json(source, SETUP_FILE, lambda value: "adapter_setup" in value)


def _json(source: Source, name: str, accepts: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any] | None:
    if name not in source.files:
        return None
    value = source.json(name)
    return value if isinstance(value, Mapping) and accepts(value) else None


# -- setups -----------------------------------------------------------------------------------------------------------


def _folders(setup: Mapping[str, Any], where: object) -> list[str]:
    """The folders of a setup's adapters, and behind them those of its fusions."""
    names, fusions = dict[str, None](), dict[str, None]()
    for block in _blocks(setup["adapter_setup"], where, _DEPTH):
        children = block["children"]
        if block["type"] == "single":
            names[str(children[0])] = None
        elif block["type"] == "Fuse":
            own = block.get("kwargs", {}).get("name") if isinstance(block.get("kwargs"), Mapping) else None
            fusions[str(own or _told(block, ",", words=False))] = None
    found = [*names, *fusions]
    if not 1 <= len(names) <= _MOST:
        raise InvalidHeaderError(f"must name from 1 to {_MOST} adapters, not {len(names)}", where, "adapter_setup")
    return found


def _blocks(block: Any, where: object, depth: int) -> Iterator[Mapping[str, Any]]:
    children = block.get("children") if isinstance(block, Mapping) else None
    if not depth or not isinstance(children, list) or not children or not isinstance(block.get("type"), str):
        raise InvalidHeaderError(f"must be blocks with children, not {shown(block)}", where, "adapter_setup")
    single = block["type"] == "single"
    if single and not isinstance(children[0], str):
        raise InvalidHeaderError(f"must be a name, not {shown(children[0])}", where, "adapter_setup")
    yield block
    for child in [] if single else children:
        yield from _blocks(child, where, depth - 1)


def _told(block: Mapping[str, Any], between: str = ", ", *, words: bool = True) -> str:
    if block["type"] == "single":
        return str(block["children"][0])
    inner = between.join(_told(child, between, words=words) for child in block["children"])
    return f"{block['type']}({inner})" if words else inner


def _name(folder: str, taken: Mapping[str, Checkpoint]) -> str:
    """An adapter's name is its folder's; that of a fusion, which holds commas, is no name here."""
    if "," not in folder:
        return folder
    names = ["fusion", *(f"fusion_{i}" for i in range(2, _MOST))]
    return next(name for name in names if name not in taken)


def _joined(reports: Sequence[ReadReport], note: str) -> ReadReport:
    def each(name: str) -> list[str]:
        return [item for report in reports for item in getattr(report, name)]

    notes = list(dict.fromkeys([note, *each("notes")]))
    first = reports[0]
    return ReadReport(each("matched"), each("unmatched"), each("left_over"), notes, _TOOL, first.version, first.base)
