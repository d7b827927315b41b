"""Trackers of experiments, reached through accelerate: TensorBoard, wandb, Trackio and the others that it knows."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from adapterkit.errors import ConfigError, did_you_mean
from adapterkit.training.events import Callback, Training
from adapterkit.training.result import Result
from adapterkit.training.run import Run

_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
_PROJECT = "adapterkit"
_FOLDERS = {"wandb": "dir"}
"""The setting of a tracker that says where its files are, which else are in the working directory."""
_ARRAYS = {"tensorboard": {"dataformats": "NHWC"}}
"""What a tracker's `log_images` has to be told of arrays."""


def tracker_names(run: Run) -> list[str]:
    """The trackers of a run.

    Raises:
        ConfigError: accelerate does not know one, or its package is not installed.
    """
    names = [one if isinstance(one, str) else str(one.get("type")) for one in run.config.trackers]
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    there = {str(name) for name in get_available_trackers()}
    problems = [
        f"trackers: unknown tracker {name!r}.{did_you_mean(name, known)}" for name in names if name not in known
    ]
    problems += [
        f"trackers: {name} is not installed. Run: pip install {name.replace('_', '-')}"
        for name in names
        if name in known and name not in there
    ]
    if problems:
        raise ConfigError(problems, "run")
    return names


class Trackers(Callback):
    """Sends metrics, figures, samples and the whole configuration to the trackers of an accelerator."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        self._accelerator = accelerator

    def begin(self, training: Training) -> None:
        given = [{"type": one} if isinstance(one, str) else one for one in training.run.config.trackers]
        settings = {str(one["type"]): _settings(one, training.folder / "trackers") for one in given}
        project = next((str(one["project"]) for one in given if "project" in one), _PROJECT)
        config = dict(_flat(training.run.resolved()))
        self._accelerator.init_trackers(project, config=config, init_kwargs=settings)

    def step(self, training: Training, record: Mapping[str, Any]) -> None:
        self._log({f"train/{key}": value for key, value in record.items() if key != "step"}, training.step)

    def evaluate(self, training: Training, figures: Mapping[str, float]) -> None:
        self._log({f"evaluate/{key}": value for key, value in figures.items()}, training.step)

    def sample(self, training: Training, files: Sequence[Path]) -> None:
        texts = {f"samples/{_label(file)}": file.read_text(encoding="utf-8") for file in files if file.suffix == ".txt"}
        self._log(texts, training.step)
        pictures = [file for file in files if file.suffix.lower() in _PICTURES]
        for tracker in self._accelerator.trackers if pictures else ():
            _send(tracker, pictures, training.step)

    def end(self, training: Training, result: Result) -> None:
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if told := {key: value for key, value in values.items() if value is not None}:
            self._accelerator.log(told, step=step)


def _settings(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a tracker is told, with its files in the run folder, unless they are to be elsewhere."""
    name = str(given["type"])
    key = _FOLDERS.get(name)
    if key is None or key in given or f"{name}_{key}".upper() in os.environ:
        place = {}
    else:
        folder.mkdir(parents=True, exist_ok=True)
        place = {key: str(folder)}
    return {**place, **{key: value for key, value in given.items() if key not in ("type", "project")}}


def _send(tracker: Any, files: Sequence[Path], step: int) -> None:
    import numpy as np
    from PIL import Image

    if not hasattr(tracker, "log_images"):  # Trackio's takes its own class of images in `log`
        library: Any = importlib.import_module(tracker.name)
        tracker.log({f"samples/{_label(file)}": library.Image(str(file)) for file in files}, step=step)
        return
    for file in files:
        with Image.open(file) as image:
            array = np.asarray(image.convert("RGB"))[None]
        tracker.log_images({f"samples/{_label(file)}": array}, step=step, **_ARRAYS.get(tracker.name, {}))


def _label(file: Path) -> str:
    """What a sample is called: its name without the step, so that one prompt's are one series."""
    prompt = file.stem.partition("_p")[2]
    return f"p{prompt}" if prompt else file.stem


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else str(value)
