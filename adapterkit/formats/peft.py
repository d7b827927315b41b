"""Adapters of PEFT: a folder of `adapter_config.json` and tensors, or the tensors alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterkit.checkpoint import Checkpoint, Format, ReadOptions, ReadReport, WriteOptions, WriteReport, single
from adapterkit.codec import Context, Place
from adapterkit.errors import MissingKeysError
from adapterkit.formats import container
from adapterkit.formats.dialect import Dialect, ForeignModule
from adapterkit.formats.files import make_folder, write_folder
from adapterkit.formats.modules import made_up
from adapterkit.formats.parts import Collected
from adapterkit.formats.peft_config import CONFIG_FILE, KEPT, WEIGHT_FILES, PeftConfig, config_in
from adapterkit.formats.peft_keys import Foreign, grouped, is_wrapped
from adapterkit.formats.peft_places import ModelNames
from adapterkit.formats.peft_write import PeftWriter
from adapterkit.formats.source import Source
from adapterkit.points import Points

DIALECT = "peft"


class PeftFormat(Format):
    """What PEFT's `save_pretrained` writes, and the tensors alone where they tell enough."""

    def recognises(self, source: Source) -> bool:
        if source.is_folder:
            return config_in(source) is not None or bool(_named(source))
        return any(is_wrapped(key) or key == "prompt_embeddings" for key in source.entries)

    def read(self, source: Source, points: Points, options: ReadOptions) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        found: dict[str, Checkpoint] = {}
        reports: list[ReadReport] = []
        for name, where in _sources(source):
            checkpoint, report = _Reader(where, points).read()
            found |= {} if checkpoint is None else {name: checkpoint}
            reports.append(report)
        return found, _joined(reports)

    def write(
        self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions
    ) -> WriteReport | None:
        notes: list[str] = []
        if not all(checkpoints):
            single(checkpoints, target)
        for name, checkpoint in checkpoints.items():
            if name:
                make_folder(target)
            notes += _written(checkpoint, target / name if name else target, points, options)
        return WriteReport(notes)


def _written(checkpoint: Checkpoint, folder: Path, points: Points, options: WriteOptions) -> Sequence[str]:
    writer = PeftWriter(checkpoint, points, options, folder)
    tensors = {key: options.cast(tensor) for key, tensor in writer.tensors().items()}
    config = writer.config({key: text for key, text in checkpoint.metadata.items() if key in KEPT})
    weights = container.pieces(folder / WEIGHT_FILES[0], tensors, {**checkpoint.metadata, "format": "pt"})
    write_folder(folder, {WEIGHT_FILES[0]: weights, CONFIG_FILE: [json.dumps(config, indent=2).encode()]})
    return writer.notes


def _named(source: Source) -> list[Source]:
    """The folders of adapters with names of their own in a folder."""
    inner = [source.file(name) for name in source.files]
    return [one for one in inner if one.is_folder and config_in(one) is not None]


def _sources(source: Source) -> list[tuple[str, Source]]:
    """What is to be read, by name."""
    if not source.is_folder:
        return [("", source)]
    own = [("", source)] if config_in(source) is not None else []
    return [*own, *((one.name, one) for one in _named(source))]


class _Reader:
    """Reads one adapter."""

    def __init__(self, source: Source, points: Points) -> None:
        self.config = PeftConfig(config_in(source) or {}, source.where)
        self.source = _weights(source) if source.is_folder else source
        self.points = points
        self.dialect = Dialect(DIALECT)
        self.found = Collected(source.where)

    def read(self) -> tuple[Checkpoint | None, ReadReport]:
        tensors = self.source.tensors()
        names = ModelNames(self.points, self.config)
        modules, whole, unknown = grouped(tensors, self.dialect, names.parameters)
        context = Context(
            self.source.where, dict(self.config.values), {name: tensors[key] for name, key in whole.items()}
        )
        matched: list[str] = []
        unmatched: list[str] = []
        names.look_at(modules)
        for foreign, keys in modules.items():
            own = dataclasses.replace(context, config=self.config.at(names.pattern_path(foreign)))
            places = names.places(foreign) if len(self.points) else self._made_up(foreign, keys, tensors, own)
            module = ForeignModule(foreign.path, keys, places)
            reading = self.dialect.read([module], tensors, own, self.found)
            matched += reading.matched
            unmatched += reading.unmatched
            unknown += reading.left_over
        matched += [key for name, key in whole.items() if name in context.used]
        unknown += [key for name, key in whole.items() if name not in context.used]
        done = set(matched)
        left_over = [key for key in dict.fromkeys(unknown) if key not in done]
        report = ReadReport(matched, unmatched, left_over, list(context.notes), "PEFT", self._version, fresh=True)
        if not self.found:
            return None, report
        metadata = {**self.source.metadata, **self.config.kept}
        return Checkpoint(self.found.parts(context.shared), metadata=metadata), report

    def _made_up(
        self, foreign: Foreign, keys: Mapping[str, str], tensors: Mapping[str, Any], context: Context
    ) -> list[Place] | None:
        shape = self.dialect.shape({name: tensors[key] for name, key in keys.items()}, context)
        return None if shape is None else [made_up("model", foreign.path, shape)]

    @property
    def _version(self) -> str:
        found = self.config.values.get("peft_version", "")
        return found if isinstance(found, str) else ""


def _weights(folder: Source) -> Source:
    here = [name for name in WEIGHT_FILES if name in folder.files]
    if not here:
        raise MissingKeysError(f"has a config and no tensors; expected {' or '.join(WEIGHT_FILES)}", folder.where)
    return folder.file(here[0])


def _joined(reports: Sequence[ReadReport]) -> ReadReport:
    if len(reports) == 1:
        return reports[0]
    lists = {
        name: [key for report in reports for key in getattr(report, name)]
        for name in ("matched", "unmatched", "left_over", "notes")
    }
    return dataclasses.replace(reports[0] if reports else ReadReport(), **lists)
