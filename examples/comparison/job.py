"""What a job of the comparison is: data, a base, the run that all methods share, and one figure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from adapterkit.training.result import Result
from examples.comparison.methods import HEAD, METHODS, Places


class Job(ABC):
    """Subclasses make their data and base in a folder, once.

    Args:
        folder: For all that is made; what is there is not made again.
        steps: Optimizer steps of a run; the job's own number by default.

    Attributes:
        name: Of the command line.
        title: Of the table.
        figure: The figure by which rates are chosen and methods compared.
        larger_is_better: Of that figure.
        new_head: Whether a fresh head trains beside every method.
        head_rate: A learning rate of that head's own beside every method; None for the method's.
        scale: What the customary rates are multiplied by.
        places: Where methods act.
        usual_steps: Optimizer steps.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    figure: ClassVar[str]
    larger_is_better: ClassVar[bool] = True
    new_head: ClassVar[bool] = False
    head_rate: ClassVar[float | None] = None
    scale: ClassVar[float] = 1.0
    places: ClassVar[Places] = Places()
    usual_steps: ClassVar[int]

    def __init__(self, folder: Path, steps: int | None = None) -> None:
        self.folder, self.steps = folder / self.name, steps or self.usual_steps

    @property
    def methods(self) -> list[str]:
        """Names of the methods that this job knows."""
        return [name for name in METHODS if self.new_head or name != HEAD]

    def ready(self) -> None:
        """Makes the data and the base where they are not there; a mark is set when all is."""
        mark = self.folder / "ready"
        if not mark.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.make()
            mark.touch()

    @abstractmethod
    def make(self) -> None:
        """Makes the data and the base in `folder`. The same every time."""

    @abstractmethod
    def values(self, split: str) -> Mapping[str, Any]:
        """Keys of the run: task, model, data, batch size, options.

        Args:
            split: "validation" or "test": what is measured with.
        """

    @abstractmethod
    def measure(self, result: Result, split: str) -> Mapping[str, float]:
        """`figure`, `base` (the same of the base alone), and what else is told."""
