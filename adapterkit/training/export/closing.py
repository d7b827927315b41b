"""What a finished run leaves for others, all of it made of the adapter's own file and the samples that are there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterkit.handle.adapters import Adapters
from adapterkit.training.config import RunConfig
from adapterkit.training.export.card import Samples, card
from adapterkit.training.export.files import Exported, export
from adapterkit.training.export.record import trigger_of
from adapterkit.training.parts import inference
from adapterkit.training.run_folder import RunFolder, write_text
from adapterkit.training.task import Task, sample_name

CARD = "README.md"


def close(
    config: RunConfig,
    task: Task,
    model: Any,
    adapters: Adapters,
    folder: RunFolder,
    figures: Mapping[str, Any],
    tell: Callable[[str], object],
) -> list[Exported]:
    """Exports the adapter, checks the files, and writes the card.

    Args:
        config, task, model: Of the run.
        adapters: Those on the model; for the checks they come off, and afterwards the adapter is there from its file.
        folder: With the adapter's file and the samples.
        figures: What was measured.
        tell: Takes a line for the user.
    """
    samples = _samples(config, task, folder.samples)
    last = [files[-1] for _, files in samples]
    with _bare(adapters, config.adapter_name, folder.adapter), inference(model):
        exported = export(config, task, model, folder.adapter, last)
    for one in exported:
        tell(f"export {one.format}: {one}")
        for note in one.notes:
            tell(f"export {one.format}: {note}")
    write_text(folder.path / CARD, card(config, trigger_of(config, task), samples, exported, figures))
    return exported


@contextlib.contextmanager
def _bare(adapters: Adapters, name: str, file: Path) -> Iterator[None]:
    adapters.detach()
    try:
        yield
    finally:
        adapters.load(file, name)
        adapters.activate(name)


def _samples(config: RunConfig, task: Task, folder: Path) -> Samples:
    """Those of the base and of the last step that are there."""
    pairs = [
        (
            f"{prompt} (seed {seed})",
            [folder / sample_name(step, p, seed, task.suffixes[0]) for step in (0, config.steps)],
        )
        for p, prompt in enumerate(task.prompts())
        for seed in task.seeds()
    ]
    return [(label, there) for label, files in pairs if (there := [file for file in files if file.is_file()])]
