"""What a finished run leaves for others, all of it made of the adapter's own file and the samples that are there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterkit.errors import CheckpointError, StateError
from adapterkit.handle.adapters import Adapters
from adapterkit.training.config import RunConfig
from adapterkit.training.export.baked import MODEL, write_baked
from adapterkit.training.export.card import card
from adapterkit.training.export.files import Exported, export
from adapterkit.training.export.record import trigger_of
from adapterkit.training.parts import inference
from adapterkit.training.run_folder import RunFolder, write_text
from adapterkit.training.samples.previews import Previews
from adapterkit.training.samples.sheets import Rows
from adapterkit.training.task import Task

CARD = "README.md"


@dataclass(frozen=True)
class Left:
    """What a run has come to.

    Attributes:
        figures: What was measured, and what there is now, and where.
        failed: A sentence for each file that is not what was trained, or that was asked for and is not there.
    """

    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])
    failed: Sequence[str] = ()


def close(
    task: Task,
    model: Any,
    adapters: Adapters,
    previews: Previews,
    folder: RunFolder,
    figures: Mapping[str, Any],
    tell: Callable[[str], object],
) -> Left:
    """Exports the adapter, checks the files, writes the card, and bakes the model where the run asks for it.

    Args:
        task, model: Of the run.
        adapters: Those on the model; for the checks they come off, and afterwards the adapter is there from its file.
        previews: The samples.
        folder: With the adapter's file.
        figures: What was measured.
        tell: Takes a line for the user.
    """
    config = task.config
    rows = _there(previews.rows([0, config.steps]))
    with _bare(adapters, config.adapter_name, folder.adapter), inference(model):
        exported = export(config, task, model, folder.adapter, [files[-1] for _, files in rows])
    for one in exported:
        tell(f"export {one.format}: {one}")
        for note in one.notes:
            tell(f"export {one.format}: {note}")
    write_text(folder.path / CARD, card(config, trigger_of(config, task), rows, exported, figures))
    found = {f"for {one.format}": str(one if one.failed else one.path) for one in exported if not one.problem}
    failed = [f"export {one.format}: {one}" for one in exported if one.failed and _counts(one, config)]
    if config.bake:
        place = folder.path / MODEL
        shutil.rmtree(place, ignore_errors=True)  # of this run, when it was finished before
        try:
            apart = write_baked(task, model, adapters, place)
            tell(f"bake: {place}, read back by its own library: {apart:.1g} apart")
            found["baked model"] = str(place)
        except (CheckpointError, StateError) as error:
            failed.append(f"bake: NOT WRITTEN: {error}")
            tell(failed[-1])
    return Left({**figures, **found}, tuple(failed))


def _counts(one: Exported, config: RunConfig) -> bool:
    """Whether it is a fault: what the task would have written by itself, and cannot be, was told before."""
    return config.export is not None or not one.problem


def _there(rows: Rows) -> Rows:
    """Without the files that are not there."""
    found = [(label, [file for file in files if file.is_file()]) for label, files in rows]
    return [(label, files) for label, files in found if files]


@contextlib.contextmanager
def _bare(adapters: Adapters, name: str, file: Path) -> Iterator[None]:
    adapters.detach()
    try:
        yield
    finally:
        adapters.load(file, name)
        adapters.activate(name)
