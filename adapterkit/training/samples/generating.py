"""Samples of trained adapters: several files, weights, prompts and seeds with one load of the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit.composition import Expression
from adapterkit.errors import ConfigError
from adapterkit.handle.adapters import Adapters
from adapterkit.training.checked import CheckedTask
from adapterkit.training.loading import device_here
from adapterkit.training.parts import inference
from adapterkit.training.run import Run
from adapterkit.training.samples.places import Place
from adapterkit.training.samples.sample import Sample
from adapterkit.training.samples.sheets import sheet
from adapterkit.training.state import load_modules


@dataclass(frozen=True)
class Column:
    """What acts in one set of samples.

    Attributes:
        label: For people.
        mark: Part of the files' names.
        weights: Place -> how strongly its adapter acts; None leaves it to the sample.
        place: Whose other trained modules, such as a head, are loaded.
    """

    label: str
    mark: str
    weights: Mapping[int, float | None]
    place: Place


def columns_of(places: Sequence[Place], weights: Sequence[float], *, together: bool) -> list[Column]:
    """One for each place and weight; or one alone, where the places act together, each with its own weight.

    Raises:
        ConfigError: Places that act together have too few weights, or too many.
    """
    if together:
        if weights and len(weights) != len(places):
            told = f"{len(places)} adapters act together and there are {len(weights)} weights; give one for each"
            raise ConfigError([told], "sample")
        own = dict(enumerate(weights or [1.0] * len(places)))
        label = " + ".join(f"{own[number]:g} {place.label}" for number, place in enumerate(places))
        return [Column(label, "together", own, places[0])]
    found: list[Column] = []
    for (number, place), weight in itertools.product(enumerate(places), weights or [None]):
        shown = [place.label] if len(places) > 1 or weight is None else []
        parts = [*shown, *([] if weight is None else [f"weight {weight:g}"])]
        marks = [*([place.label] if len(places) > 1 else []), *([] if weight is None else [f"w{weight:g}"])]
        found.append(Column(" ".join(parts), "_".join(marks), {number: weight}, place))
    return found


class Generator:
    """A model with adapters from files.

    Args:
        run: Says which model, and how samples are drawn.
        places: The adapters.
    """

    def __init__(self, run: Run, places: Sequence[Place]) -> None:
        self.task = CheckedTask(run)
        self._model = self.task.load_model()
        device = device_here()
        self.task.place(self._model, device)
        self.task.prepare_generation(self._model, device)
        self._adapters = Adapters(self._model)
        for number, place in enumerate(places):
            self._adapters.load(place.file, _name(number))

    def draw(
        self, columns: Sequence[Column], samples: Sequence[Sample], output: Path, tell: Callable[[Path], object]
    ) -> list[Path]:
        """Writes a file for each sample and column, and of several columns a sheet with all of them.

        Args:
            columns: What acts.
            samples: What is drawn.
            output: The file, or what several are named after.
            tell: Is told of each file when it is there.
        """
        names = list(_names(columns, samples, output))
        output.parent.mkdir(parents=True, exist_ok=True)
        for column, sample, path in names:
            load_modules(self.task.extra_modules(), column.place.file.parent)
            told = 1.0 if sample.weight is None else sample.weight
            own = {number: told if weight is None else weight for number, weight in column.weights.items()}
            acting: dict[Expression, float] = {_name(number): weight for number, weight in own.items()}
            with inference(self._model), self._adapters.activated(acting):
                self.task.generate(sample, path)
            tell(path)
        if len(columns) == 1:
            return [path for _, _, path in names]
        rows = [(one.label, [path for _, sample, path in names if sample == one]) for one in samples]
        page = sheet(output.with_name(f"{output.stem}_grid"), [column.label for column in columns], rows)
        tell(page)
        return [*(path for _, _, path in names), page]


def _name(number: int) -> str:
    return f"adapter{number}"


def _names(columns: Sequence[Column], samples: Sequence[Sample], output: Path) -> Iterator[tuple[Column, Sample, Path]]:
    for column, sample in itertools.product(columns, samples):
        marks = [column.mark] if len(columns) > 1 else []
        marks += [sample.stem] if len(samples) > 1 else []
        yield column, sample, output.with_stem("_".join([output.stem, *marks]))


def with_seeds(samples: Sequence[Sample], seeds: Sequence[int]) -> list[Sample]:
    """The same prompts, each with these seeds; as they are where none is given."""
    if not seeds:
        return [*samples]
    first = {one.number: one for one in reversed(samples)}
    return [replace(first[number], seed=seed) for number in sorted(first) for seed in seeds]
