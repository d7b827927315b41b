"""The samples of a run: of the base, along the way, of the last step, and of other strengths of the adapter."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from adapterkit.handle.adapters import Adapters
from adapterkit.training.config import RunConfig
from adapterkit.training.samples.sample import Sample, sample_name
from adapterkit.training.samples.sheets import Rows, is_picture, sheet
from adapterkit.training.task import Task

_STEP = re.compile(r"step_(\d+)_")
_MOST = 8
"""Columns of a grid."""


class Previews:
    """What is drawn, and where it lies; without samples, where the run's `samples` is false.

    Args:
        task: The run's.
        folder: The samples'.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self._task, self.folder = task, folder

    @property
    def _config(self) -> RunConfig:
        return self._task.config

    @property
    def samples(self) -> Sequence[Sample]:
        """What every step draws."""
        return self._task.samples() if self._config.samples else ()

    def draw(self, step: int, adapters: Adapters | None) -> list[Path]:
        """The samples of a step.

        Args:
            step: How many steps are done.
            adapters: Of the model; None while it has none.
        """
        return [self._drawn(one, self._file(step, one), adapters, one.weight) for one in self.samples]

    def rows(self, steps: Sequence[int]) -> Rows:
        """Of every sample what it shows at these steps."""
        return [(one.label, [self._file(step, one) for step in steps]) for one in self.samples]

    def steps(self) -> list[int]:
        """The steps that have samples here: the first, the last, and at most six others."""
        names = {self._file(0, one).name.partition("_p")[2] for one in self.samples}
        found = sorted({int(match[1]) for path in self.folder.iterdir() if (match := self._step_of(path, names))})
        if len(found) <= _MOST:
            return found
        return [found[round(place * (len(found) - 1) / (_MOST - 1))] for place in range(_MOST)]

    def finish(self, step: int, adapters: Adapters) -> Mapping[str, str]:
        """What sums the samples up: `grid` over the steps, `strengths` over the adapter's weights, where it takes some.

        Args:
            step: The last one, which has its samples.
            adapters: Of the model.
        """
        if not self.samples:
            return {}
        steps = self.steps()
        labels = ["base" if one == 0 else f"step {one}" for one in steps]
        found = {"grid": str(sheet(self.folder / "grid", labels, self.rows(steps)))}
        if self._config.strengths and all(m.scalable for m in adapters.modules(self._config.adapter_name).values()):
            rows = [(one.label, self._strengths(step, one, adapters)) for one in self.samples]
            labels = [f"weight {weight:g}" for weight in self._config.strengths]
            found["strengths"] = str(sheet(self.folder / "strengths", labels, rows))
        return found

    def _strengths(self, step: int, sample: Sample, adapters: Adapters) -> list[Path]:
        there = {0.0: self._file(0, sample)}
        there |= {1.0 if sample.weight is None else sample.weight: self._file(step, sample)}
        found: list[Path] = []
        for weight in self._config.strengths:
            path = there.get(weight)
            if path is None or not path.is_file():
                path = self.folder / f"weight_{weight:g}_{sample.stem}{self._task.suffixes[0]}"
                self._drawn(sample, path, adapters, weight)
            found.append(path)
        return found

    def _drawn(self, sample: Sample, path: Path, adapters: Adapters | None, weight: float | None) -> Path:
        with acting(adapters, self._config.adapter_name, weight):
            self._task.generate(sample, path)
        return path

    def _file(self, step: int, sample: Sample) -> Path:
        return self.folder / sample_name(step, sample, self._task.suffixes[0])

    def _step_of(self, path: Path, names: set[str]) -> re.Match[str] | None:
        return _STEP.match(path.name) if path.name.partition("_p")[2] in names else None


def acting(adapters: Adapters | None, name: str, weight: float | None) -> contextlib.AbstractContextManager[None]:
    """In the block the adapter acts with this weight; as it is where there is none, or no adapter."""
    if adapters is None or weight is None:
        return contextlib.nullcontext()
    return adapters.activated({name: weight})


def told(step: int, samples: Sequence[Sample], written: Sequence[Path]) -> Iterator[str]:
    """Lines for people: of texts what they say, of others where they are."""
    if not written:
        return
    yield f"step {step}: {len(written)} samples in {written[0].parent}"
    for sample, path in zip(samples, written, strict=True):
        if not is_picture(path):
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            yield textwrap.indent(f"{sample.label}:\n{text}", "  ")
