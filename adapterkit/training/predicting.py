"""What a trained adapter says of new inputs."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

from adapterkit.errors import StateError
from adapterkit.training.loaded import Loaded
from adapterkit.training.parts import inference
from adapterkit.training.run import Run
from adapterkit.training.samples.places import Place, record_of
from adapterkit.training.task import Prediction


class Predictor:
    """A model with an adapter from a file.

    Args:
        run: Says which model, and how inputs are read.
        place: The adapter.
        weight: How strongly it acts.

    Attributes:
        classes: The names of the classes by number.

    Raises:
        StateError: The file does not name its classes, or the task has none.
    """

    def __init__(self, run: Run, place: Place, weight: float = 1.0) -> None:
        record = record_of(place)
        if record is None or not record.classes:
            raise StateError(f"{place.file} does not name its classes; name a file of a run that learnt some")
        self._loaded = Loaded(run, place, weight)
        self.classes = self._loaded.classes

    def __call__(self, inputs: Sequence[Path]) -> Generator[Prediction, None, None]:
        """See `Task.predict`."""
        with inference(self._loaded.model):
            yield from self._loaded.task.predict(inputs)
