"""What a trained adapter says of new inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from adapterkit.errors import StateError
from adapterkit.handle.adapters import Adapters
from adapterkit.training.checked import CheckedTask
from adapterkit.training.export.baked import write_baked
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
        self.classes = () if record is None else record.classes
        if not self.classes:
            raise StateError(f"{place.file} does not name its classes; name a file of a run that learnt some")
        self._task = CheckedTask(run)
        self._task.recall(self.classes)
        self._model = self._task.load_model()
        self._task.place(self._model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._adapters, name = Adapters(self._model), run.config.adapter_name
        self._adapters.load(place.file, name)
        self._adapters.activate({name: weight})

    def bake(self, folder: Path) -> float:
        """Writes the model with the adapter in its weights; it is of no further use here. See `write_baked`."""
        return write_baked(self._task, self._model, self._adapters, folder)

    def __call__(self, inputs: Sequence[Path]) -> Iterator[Prediction]:
        """See `Task.predict`."""
        with inference(self._model):
            yield from self._task.predict(inputs)
