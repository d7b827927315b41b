"""The contract of a task: what turns data into a loss. Tasks are plug-ins; the loop knows this contract and no task.

Everything that a task imports of adapterkit is here.

The loop calls, in this order: `survey`, `outline`, `load_model`, `prepare`, `evaluate` and `generate` (the base model),
then for every step `loss` on what `collate` made of the dataset's items, now and then `evaluate` and `generate`, and at
the end `finish`, `exports` and `probe`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig
from adapterkit.checkpoint import OtherReader
from adapterkit.errors import ConfigError, DataError, StateError
from adapterkit.points import Points
from adapterkit.training.config import RunConfig, Section, Seed
from adapterkit.training.data_files import Notes, content_key
from adapterkit.training.data_record import DataRecord
from adapterkit.training.order import Draw, derive_seed
from adapterkit.training.samples.prompts import Prompts, samples_of
from adapterkit.training.samples.sample import Sample

__all__ = [
    "DataError",
    "DataRecord",
    "Dataset",
    "Draw",
    "Notes",
    "OtherReader",
    "Prediction",
    "Prompts",
    "RunConfig",
    "Sample",
    "Section",
    "Seed",
    "Setting",
    "Task",
    "content_key",
    "derive_seed",
    "samples_of",
]


class Dataset(Protocol):
    """Examples by number. Whatever is random about an example follows from the draw's seed, so that runs resume.

    It may have `groups`, a number for every example: a batch then is of examples with the same (as of one size).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw, /) -> Any: ...


def groups_of(data: Dataset) -> Sequence[int] | None:
    """Which examples may be in one batch; None where all may."""
    return getattr(data, "groups", None)


def _to_nobody(line: str) -> None: ...


@dataclass(frozen=True)
class Setting:
    """What a task is told before training.

    Attributes:
        model: What `load_model` returned, on the device, still without the adapter.
        device: Where it is.
        points: Where the adapter will act; `component` says in which part of a pipeline.
        tell: Takes a line for the user, such as what is not as he may expect.
    """

    model: Any
    device: torch.device
    points: Points
    tell: Callable[[str], object] = _to_nobody

    @property
    def components(self) -> frozenset[str]:
        """The parts of the model that the adapter will act in."""
        return frozenset(point.component for point in self.points)


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input.

    Attributes:
        name: The input.
        probabilities: Of the classes, by number.
        said: The numbers of the classes that it is said to be of.
        problem: Why there are none.
    """

    name: str
    probabilities: Sequence[float] = ()
    said: Sequence[int] = ()
    problem: str = ""


class Task(ABC):
    """Subclasses override the abstract methods, and what else they need.

    Args:
        config: The run.
        options: An instance of `Options`.

    Attributes:
        Options: The task's own keys, under `options` in the run file.
        free_options: Names of options that change no step, so that they may differ when a run is resumed.
        larger_is_better: Names of figures of which more is better.
        suffixes: The endings of the files that `generate` can write; samples have the first.
        sampling: The options that samples depend on, which the adapter's file keeps.
    """

    Options: ClassVar[type[BaseModel]]
    free_options: ClassVar[frozenset[str]] = frozenset()
    larger_is_better: Set[str] = frozenset()
    suffixes: Sequence[str] = (".txt",)
    sampling: Sequence[str] = ()

    def __init__(self, config: RunConfig, options: Any) -> None:
        self.config = config
        self.options = options

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Looks at the data before anything is loaded: names every file at fault, and says what there is.

        A run is resumed on the data that it began with, as far as this tells it. What `survey` does not list is not
        compared.

        Args:
            before: Of a resumed run what it began with; `DataRecord.following` keeps the numbers of the classes.

        Raises:
            DataError: The data cannot be used.
        """
        return DataRecord()

    def outline(self) -> Any:
        """The base on the meta device, from its configuration alone, where it can be had so; else None.

        The points of the adapter, and what the run needs of memory and disk, are then known before weights are read.
        """
        return None

    def foresee(self, outline: Any) -> Mapping[str, str]:
        """What the data becomes for the model of that outline, for `--dry-run`; added to the facts of `survey`."""
        return {}

    @abstractmethod
    def load_model(self) -> Any:
        """The base: a module, or a pipeline with `components`. On the CPU, in the run's `dtype`."""

    def place(self, model: Any, device: torch.device) -> None:
        """Brings what `load_model` returned to the device; all of it, unless a task knows better."""
        model.to(device)

    def core(self, model: Any) -> nn.Module:
        """What every step runs of a model or its outline: its blocks may wait on the host (`block_swap`).

        Raises:
            ConfigError: The task does not say what that is of a pipeline.
        """
        if isinstance(model, nn.Module):
            return model
        raise ConfigError(["block_swap: this task does not say which part of its pipeline has the blocks"], "run")

    @abstractmethod
    def prepare(self, setting: Setting) -> Dataset:
        """Reads the data, and computes once what the adapter cannot change.

        Raises:
            DataError: Naming every file at fault.
        """

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch, a scalar; in train mode, under autocast where that is asked for."""

    def amount(self, batch: Any) -> tuple[int, str]:
        """How much a batch holds, and of what: for the speed that is told. Tokens, where examples differ in length."""
        return self.config.batch_size, "examples"

    def weight(self, batch: Any) -> float:
        """How much the loss of a batch counts among those of a step: of how many things it is the mean, above 0.

        With tokens, a step of several batches, on several processes, then has the gradient of one large batch.
        """
        return 1.0

    def collate(self, items: Sequence[Any]) -> Any:
        """A batch from the dataset's items."""
        return torch.utils.data.default_collate(list(items))

    def checkpoint_activations(self) -> None:
        """Makes the model recompute activations in the backward pass.

        Raises:
            ConfigError: It cannot.
        """
        raise ConfigError(["gradient_checkpointing: this task's model cannot; set it to false"], "run")

    def also(self) -> Sequence[AdapterConfig]:
        """What else trains as parts of the adapter, at points of their own, such as a fresh head: `Trainable("head")`.

        It is asked for when the model is loaded, or its outline is there.
        """
        return ()

    def class_names(self) -> Sequence[str]:
        """The names of the classes by number, where there are any: the adapter's file keeps them."""
        return ()

    def extra_modules(self) -> Mapping[str, nn.Module]:
        """Modules of the base that are trained and saved beside the adapter, by file name."""
        return {}

    def evaluate(self) -> Mapping[str, float]:
        """Figures on held-out data, in evaluation mode and without gradients."""
        return {}

    def measures(self) -> Collection[str] | None:
        """The names of what `evaluate` will measure, as far as `survey` has told; None where it is not known yet.

        By it `best` is checked before the model is loaded.
        """
        return None

    def samples(self) -> Sequence[Sample]:
        """What samples are made from while training."""
        return ()

    def generate(self, sample: Sample, path: Path) -> None:
        """Makes one sample in evaluation mode and writes it to `path`."""
        raise StateError(f"the task {self.config.task!r} does not generate anything")

    def prepare_generation(self, model: Any, device: torch.device) -> None:
        """What `generate` needs, where there is no training."""
        raise StateError(f"the task {self.config.task!r} does not generate anything")

    def recall(self, classes: Sequence[str]) -> None:
        """Takes the names of the classes from an adapter's file, before `load_model` and in the place of `survey`."""
        raise StateError(f"the task {self.config.task!r} predicts no classes")

    def predict(self, inputs: Sequence[Path]) -> Iterator[Prediction]:
        """What the model says of the files, and of the files in the folders, one after the other.

        Raises:
            DataError: There is no such file or folder, or none that is read.
        """
        raise StateError(f"the task {self.config.task!r} predicts no classes")

    def finish(self, samples: Path) -> Mapping[str, Any]:
        """The last word: files that sum up the samples in that folder, figures for the summary."""
        return {}

    def exports(self) -> Sequence[str]:
        """Formats that the adapter is written in at the end, where the run names none."""
        return ()

    def triggers(self) -> Sequence[str]:
        """The words that call what was learnt, where the data tells."""
        return ()

    def metadata(self) -> Mapping[str, str]:
        """What exported files say of the training, by the names that other tools read."""
        return {}

    def probe(self) -> Tensor | None:
        """What the model computes of a fixed input: shows whether an exported file does the same."""
        return None

    def write_model(self, folder: Path) -> Tensor:
        """Writes the model, which has no adapters any more, as its own library does; it then has a `probe`.

        Returns:
            The same of the model that is read back from there, by that library alone.
        """
        raise StateError(f"the task {self.config.task!r} does not write models; `adapterkit bake MODEL FILE OUT` may")

    def other_reader(self, format: str) -> OtherReader | None:
        """The library that reads files of that format into the model; None where there is none."""
        return None

    def as_loaded(self) -> AbstractContextManager[object]:
        """A context for other libraries: what a run changes beside modules, such as tokenizers, is as it was loaded."""
        return nullcontext()
