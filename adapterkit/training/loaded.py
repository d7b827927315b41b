"""The model of a run with an adapter from a file, as it was when it was trained."""

from __future__ import annotations

from pathlib import Path

from adapterkit.handle.adapters import Adapters
from adapterkit.training.checked import CheckedTask
from adapterkit.training.export.baked import write_baked
from adapterkit.training.loading import device_here
from adapterkit.training.run import Run
from adapterkit.training.samples.places import Place, record_of


class Loaded:
    """A task with its model, and the adapter on it.

    Args:
        run: Says which model.
        place: The adapter.
        weight: How strongly it acts.

    Attributes:
        classes: The names of the classes by number; empty where the file names none.
        task: Ready to compute.
        model: Its model.
    """

    def __init__(self, run: Run, place: Place, weight: float = 1.0) -> None:
        record = record_of(place)
        self.classes = () if record is None else record.classes
        self.task = CheckedTask(run)
        if self.classes:
            self.task.recall(self.classes)
        self.model = self.task.load_model()
        self.task.place(self.model, device_here())
        self._adapters, name = Adapters(self.model), run.config.adapter_name
        self._adapters.load(place.file, name)
        self._adapters.activate({name: weight})

    def bake(self, folder: Path) -> float:
        """Writes the model with the adapter in its weights; it is of no further use here. See `write_baked`."""
        return write_baked(self.task, self.model, self._adapters, folder)
