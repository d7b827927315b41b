"""The files of other tools that a run ends with: `export/FORMAT/` in the run folder."""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapterkit
from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import AdapterKitError, ConfigError
from adapterkit.formats.registry import NamedFormat, find_format, named_format, only
from adapterkit.formats.source import Source
from adapterkit.handle.adapters import Adapters
from adapterkit.handle.view import seen
from adapterkit.mapping.model import map_model
from adapterkit.points import Points
from adapterkit.training.config import RunConfig
from adapterkit.training.export.baked import check_bakeable
from adapterkit.training.export.checks import Check, Checks
from adapterkit.training.export.dividing import divided
from adapterkit.training.export.record import trigger_of
from adapterkit.training.export.thumbnail import thumbnail
from adapterkit.training.loading import dtype_of
from adapterkit.training.task import Task

_UNFIT = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Exported:
    """A file for other tools.

    Attributes:
        format: Its format's name.
        path: The file, or the folder.
        notes: Sentences about what its readers must know.
        checks: What its readers make of it.
        problem: Why it could not be written.
        usage: The line of a program that reads it, where a library is known that does.
    """

    format: str
    path: Path
    notes: Sequence[str] = ()
    checks: Sequence[Check] = ()
    problem: str = ""
    usage: str = ""

    @property
    def failed(self) -> bool:
        """Whether it could not be written, or is not what was trained."""
        return bool(self.problem) or not all(check.agrees for check in self.checks)

    def __str__(self) -> str:
        if self.problem:
            return f"NOT WRITTEN: {self.problem}"
        return f"{self.path} ({'; '.join(map(str, self.checks))})" if self.checks else str(self.path)


def export(config: RunConfig, task: Task, model: Any, adapter: Path, samples: Sequence[Path]) -> list[Exported]:
    """Writes the formats that a run asks for, or else its task, and checks each.

    What the run has named and cannot be written is told in the result, as is what is not read as it was trained.

    Args:
        config: The run.
        task: Its task, ready to compute.
        model: The base, without adapters.
        adapter: The adapter's own file.
        samples: Its last samples; the first is a file's thumbnail.
    """
    usual = task.exports()
    if not (usual if config.export is None else config.export):
        return []
    points = seen(map_model(model))
    source = Source.of(adapter)
    reader = find_format(source)
    trained = only(reader.read(source, points)[0], adapter)
    writer = _Writer(config, task, model, points, adapter.parent / "export", samples)
    found: list[Exported] = []
    groups = itertools.groupby(divided(trained, config.export, usual), key=lambda one: id(one[1]))
    for _, group in groups:
        listed = [*group]
        checks = Checks(task, model, listed[0][1], f"adapterkit {adapterkit.__version__}")
        found += [writer.write(format, part, checks) for format, part in listed]
    return found


def check_formats(config: RunConfig, task: Task, model: Any, adapters: Adapters, tell: Callable[[str], object]) -> None:
    """Writes the adapter as it is before its first step, so that what cannot be exported is known before, not after.

    Args:
        config: The run.
        task: Its task.
        model: Its model.
        adapters: With the adapter.
        tell: Takes a line for the user, of a format that the run has not named.

    Raises:
        ConfigError: A format that the run names cannot hold the adapter, or it is to be baked and cannot be.
    """
    if config.bake:
        check_bakeable(adapters, config.adapter_name)
    problems: list[str] = []
    points = seen(map_model(model))
    for format, part in divided(adapters.checkpoint(config.adapter_name), config.export, task.exports()):
        with tempfile.TemporaryDirectory(dir=config.output, prefix=".export-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes for readers of a file that nobody reads
            writer = named_format(format)
            try:
                writer.write({"": part}, writer.place(Path(folder), "adapter"), points)
            except AdapterKitError as error:
                problems.append(f"export: {format} cannot hold this adapter: {error}".replace(f"{folder}/", ""))
    if problems and config.export is not None:
        raise ConfigError(problems, "run")
    for problem in problems:
        tell(problem)


def title_of(config: RunConfig) -> str:
    """What the adapter is called: as the card says, or as the run folder."""
    return config.card.title or Path(config.output).resolve().name


class _Writer:
    """One adapter on its way into several formats."""

    def __init__(
        self, config: RunConfig, task: Task, model: Any, points: Points, folder: Path, samples: Sequence[Path]
    ) -> None:
        self._task, self._model, self._points, self._folder = task, model, points, folder
        self._stem = _UNFIT.sub("_", title_of(config)).strip("._") or "adapter"
        self._told: Mapping[str, Any] = {
            **config.card.model_dump(exclude={"thumbnail"}),
            "title": title_of(config),
            "trigger": trigger_of(config, task),
            "thumbnail": thumbnail(samples) if config.card.thumbnail else "",
            "dtype": None if config.export_dtype is None else dtype_of(config.export_dtype),
        }

    def write(self, format: str, part: Checkpoint, checks: Checks) -> Exported:
        own = self._folder / _UNFIT.sub("-", format)  # a plug-in's may be `plugin:name`
        shutil.rmtree(own, ignore_errors=True)
        try:
            writer = named_format(format)
            path = writer.place(own, self._stem)
            own.mkdir(parents=True)
            report = writer.write({"": part}, path, self._points, writer.writing_known(**self._told))
        except AdapterKitError as error:
            shutil.rmtree(own, ignore_errors=True)
            return Exported(format, own, problem=str(error))
        found = checks.of(writer, path)
        notes = dict.fromkeys([*report.notes, *(note for check in found for note in check.notes)])
        return Exported(format, path, [*notes], found, usage=self._usage(writer, path, found))

    def _usage(self, format: NamedFormat, path: Path, checks: Sequence[Check]) -> str:
        """The line for the library that reads the file, as seen from the run folder."""
        reader = self._task.other_reader(format.spec.name) or format.reader(self._model)
        if reader is None or reader.usage is None or any(check.unknown or not check.agrees for check in checks):
            return ""
        return reader.usage(path.relative_to(self._folder.parent))
