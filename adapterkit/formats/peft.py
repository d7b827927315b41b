"""Adapters of PEFT: a folder of `adapter_config.json` and tensors, or the tensors alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from adapterkit.checkpoint import Checkpoint, Format, ReadOptions, ReadReport, WriteOptions, WriteReport, single
from adapterkit.formats import container
from adapterkit.formats.files import make_folder, write_folder
from adapterkit.formats.module_keys import style_of
from adapterkit.formats.peft_config import CONFIG_FILE, KEPT, WEIGHT_FILES, config_in
from adapterkit.formats.peft_keys import is_wrapped
from adapterkit.formats.peft_read import PeftReadOptions, read_adapters
from adapterkit.formats.peft_write import PeftWriter
from adapterkit.formats.source import Source
from adapterkit.points import Points

DIALECT = "peft"


class PeftFormat(Format):
    """What PEFT's `save_pretrained` writes, and the tensors alone where they tell enough."""

    read_options = PeftReadOptions

    def recognises(self, source: Source) -> bool:
        if source.is_folder:
            return config_in(source) is not None or bool(_named(source))
        keys = source.entries
        return any(is_wrapped(key) or key == "prompt_embeddings" for key in keys) and style_of(keys) is None

    def diagnose(self, source: Source) -> None:
        """A folder whose config is no JSON."""
        config_in(source)

    def read(self, source: Source, points: Points, options: ReadOptions) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        found: dict[str, Checkpoint] = {}
        reports: list[ReadReport] = []
        for name, where in _sources(source):
            for own, (checkpoint, report) in read_adapters(where, points, options).items():
                found |= {} if checkpoint is None else {own or name: checkpoint}
                reports.append(report)
        return found, _joined(reports)

    def place(self, folder: Path, title: str) -> Path:
        return folder

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


def _joined(reports: Sequence[ReadReport]) -> ReadReport:
    if len(reports) == 1:
        return reports[0]
    lists = {
        name: [key for report in reports for key in getattr(report, name)]
        for name in ("matched", "unmatched", "left_over", "notes")
    }
    return dataclasses.replace(reports[0] if reports else ReadReport(), **lists)
