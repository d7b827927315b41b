"""Where an adapter lies that is to be sampled: a run folder, its checkpoints (`RUN@STEP`, `RUN@best`), or a file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import ConfigError, StateError, did_you_mean
from adapterkit.formats.registry import find_format
from adapterkit.formats.source import Source
from adapterkit.points import Points
from adapterkit.training.config import read_values
from adapterkit.training.export.record import Record, record_in
from adapterkit.training.run import Run, load_run
from adapterkit.training.snapshots import ADAPTER, Snapshots

_AT = re.compile(r"(.+)@(\d+|best)")
_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Place:
    """An adapter's file.

    Attributes:
        file: It.
        label: What it is called here: the run and its step, or the file.
        run: The run folder, where it is one's.
        note: A sentence for the user.
    """

    file: Path
    label: str
    run: Path | None = None
    note: str = ""


def place_of(text: str) -> Place:
    """What `RUN`, `RUN@STEP`, `RUN@best` or `FILE` means; a run that is not finished is its newest checkpoint.

    Raises:
        StateError: There is no such run or file; or the run has no adapter yet, or none of that step.
    """
    path, match = Path(text), _AT.fullmatch(text)
    if match is not None and not path.exists():
        _check_there(Path(match[1]))
        return _best(Path(match[1])) if match[2] == "best" else _checkpoint(Path(match[1]), int(match[2]))
    _check_there(path)
    if not path.is_dir() or not (path / _CONFIG).is_file():
        return Place(path, path.name if path.is_dir() else path.stem)
    if (path / ADAPTER).is_file():
        return Place(path / ADAPTER, path.name, path)
    steps = _steps(path)
    if not steps:
        raise StateError(f"{path} holds no finished run (no {ADAPTER}), and no checkpoint. Train it, or name a file")
    found = _checkpoint(path, steps[-1])
    return Place(found.file, found.label, path, f"{path} is not finished: its newest checkpoint is of step {steps[-1]}")


def _check_there(path: Path) -> None:
    if path.exists():
        return
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    known = [one.name for one in beside if one.suffix == Path(ADAPTER).suffix or (one / _CONFIG).is_file()]
    near = did_you_mean(path.name, known)
    raise StateError(
        f"there is no run folder or file {path} (looked in {Path.cwd()}). Name a folder that `adapterkit train` has "
        f"made (its `output`), RUN@STEP, RUN@best, or an adapter's file.{near}"
    )


def _steps(run: Path) -> list[int]:
    return Snapshots(run / "checkpoints", 1).steps()


def _checkpoint(run: Path, step: int) -> Place:
    file = Snapshots(run / "checkpoints", 1).path(step) / ADAPTER
    if not (run / _CONFIG).is_file() or not file.is_file():
        steps = _steps(run)
        there = f"there are {', '.join(map(str, steps))}" if steps else "it has none"
        raise StateError(f"{run} has no checkpoint of step {step}; {there}. keep_checkpoints says how many are kept")
    return Place(file, f"{run.name}@{step}", run)


def _best(run: Path) -> Place:
    file = run / "best" / ADAPTER
    if not file.is_file():
        raise StateError(f"{run} keeps no best adapter; a run whose `best` names a figure does")
    return Place(file, f"{run.name}@best", run)


def run_of(place: Place, overrides: Sequence[str], model: str | None, task: str | None) -> Run:
    """The run to generate with: a run folder's, or what a file says of its own, or what is told.

    Raises:
        ConfigError: Nothing tells the base; or the run's own keys are wrong.
    """
    given = {key: value for key, value in (("model", model), ("task", task)) if value is not None}
    if place.run is not None:
        return load_run(place.run / _CONFIG, [*_base_from_here(place.run), *overrides], **given)
    checkpoint = _read(place.file)
    record = record_in(checkpoint.metadata)
    known = {} if record is None else {"model": record.model, "task": record.task}
    if "model" not in {**known, **given}:
        raise ConfigError([f"{place.file} does not say which base it is for; add --model MODEL"], "sample")
    same = record is not None and given.get("task", record.task) == record.task
    recorded = _options(record) if same and record is not None else []
    return load_run(None, [*recorded, *overrides], **{**_filler(checkpoint), **known, **given})


def _base_from_here(folder: Path) -> list[str]:
    """The base of a run that was started elsewhere, as an override, where its path is one from there."""
    values = read_values(folder / _CONFIG, (), [])
    model, output = values.get("model"), values.get("output")
    if not isinstance(model, str) or not isinstance(output, str) or Path(model).is_absolute():
        return []
    below, whole = Path(output).parts, Path(os.path.abspath(folder)).parts  # noqa: PTH100 - links stay
    started = Path(*whole[: -len(below)]) if below and whole[-len(below) :] == below else Path.cwd()
    there = started != Path.cwd() and (started / model).is_dir()
    return [f"model={json.dumps(os.path.relpath(started / model))}"] if there else []


def record_of(place: Place) -> Record | None:
    """What an adapter's file says of its training; None where it says nothing."""
    return record_in(_read(place.file).metadata)


def _options(record: Record) -> list[str]:
    """What the file's samples depend on, as overrides, which others follow."""
    return [f"options.{key}={json.dumps(value)}" for key, value in record.options.items()]


def _read(file: Path) -> Checkpoint:
    """The first adapter of a file, of which the ids need fit no model."""
    source = Source.of(file)
    reader = find_format(source)
    found, _ = reader.read(source, Points([]), reader.reading(strict=False))
    return next(iter(found.values()))


def _filler(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The keys that a run must have and generating does not need."""
    part = checkpoint.parts[0]
    return {"task": "diffusion", "data": "none", "output": "none", "adapter": {"type": part.type, **part.config}}
