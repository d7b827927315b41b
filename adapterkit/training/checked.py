"""A task that names its plug-in where it fails, and whose answers are what the contract says."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig
from adapterkit.errors import AdapterKitError, PluginError
from adapterkit.plugins.manager import get_plugin_manager, owner
from adapterkit.training.config import RunConfig
from adapterkit.training.data_record import DataRecord
from adapterkit.training.order import derive_seed, seeded
from adapterkit.training.run import Run
from adapterkit.training.samples.sample import Sample
from adapterkit.training.task import Dataset, OtherReader, Prediction, Setting, Task, groups_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FULL = frozenset({errno.ENOSPC, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""What the system says of a disk where nothing more can be written: no fault of a task's."""
_OURS = frozenset({"adapter", "optimizer", "state", "training"})
"""What the other files of a checkpoint are called."""


class CheckedTask(Task):
    """See `Task`; every method raises PluginError where the task that it asks does not keep to the contract.

    Args:
        run: Says which task.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.config, run.options)
        self.plugin = owner(get_plugin_manager().task(run.config.task))
        self.inner: Task = self._ask("__init__", run.make_task)
        self.suffixes, self.sampling = self.inner.suffixes, self.inner.sampling
        self.larger_is_better = self.inner.larger_is_better

    def survey(self, before: DataRecord | None) -> DataRecord:
        found = self._ask("survey", self.inner.survey, before)
        if isinstance(found, DataRecord):
            return found
        raise self._wrong("survey", found, "a DataRecord")

    def outline(self) -> Any:
        return self._ask("outline", self.inner.outline)

    def foresee(self, outline: Any) -> Mapping[str, str]:
        found = self._ask("foresee", self.inner.foresee, outline)
        if isinstance(found, Mapping) and all(isinstance(value, str) for value in found.values()):
            return found
        raise self._wrong("foresee", found, "a dict of name -> text")

    def load_model(self) -> Any:
        """See `Task.load_model`. What the model's files lack is drawn alike in training and ever after."""
        with seeded(derive_seed(self.config.seed, "model") % 2**32):
            model = self._ask("load_model", self.inner.load_model)
        if isinstance(model, nn.Module) or isinstance(getattr(model, "components", None), Mapping):
            return model
        raise self._wrong("load_model", model, "a torch module, or a pipeline with `components`")

    def place(self, model: Any, device: torch.device) -> None:
        self._ask("place", self.inner.place, model, device)

    def core(self, model: Any) -> nn.Module:
        found = self._ask("core", self.inner.core, model)
        if isinstance(found, nn.Module):
            return found
        raise self._wrong("core", found, "a torch module")

    def prepare(self, setting: Setting) -> Dataset:
        data = self._ask("prepare", self.inner.prepare, setting)
        if not hasattr(type(data), "__len__") or not hasattr(type(data), "__getitem__"):
            raise self._wrong("prepare", data, "a dataset with __len__ and __getitem__")
        if (groups := groups_of(data)) is not None and len(groups) != len(data):
            raise self._broken(f"prepare returned {len(data)} examples and `groups` of {len(groups)}; one for each")
        return data

    def loss(self, batch: Any) -> Tensor:
        loss = self._ask("loss", self.inner.loss, batch)
        if not isinstance(loss, Tensor):
            raise self._wrong("loss", loss, "a scalar tensor")
        if loss.ndim or not loss.is_floating_point():
            told = f"{list(loss.shape)} and dtype {loss.dtype}; expected a scalar, such as loss.mean()"
            raise self._broken(f"loss returned a tensor of shape {told}")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise self._broken(
                "loss returned a tensor without a gradient: compute it with the model that load_model returned, and "
                "neither detach it nor use torch.no_grad"
            )
        return loss

    def take(self, config: RunConfig) -> None:
        """The run's keys as they follow from the data."""
        self.config = self.inner.config = config

    def amount(self, batch: Any) -> tuple[int, str]:
        found = self._ask("amount", self.inner.amount, batch)
        if isinstance(found, tuple) and [type(one) for one in found] == [int, str]:
            return found
        raise self._wrong("amount", found, "a number and what it counts, such as (512, 'tokens')")

    def weight(self, batch: Any) -> float:
        found = self._ask("weight", self.inner.weight, batch)
        if isinstance(found, (int, float)) and found > 0:
            return found
        raise self._wrong("weight", found, "a number above 0")

    def collate(self, items: Sequence[Any]) -> Any:
        """See `Task.collate`. Runs where the data is read; `batches` names who fails there."""
        return self.inner.collate(items)

    def batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches."""
        end = object()
        while True:
            batch = self._ask("the dataset or collate", next, batches, end)
            if batch is end:
                return
            yield batch

    def checkpoint_activations(self) -> None:
        self._ask("checkpoint_activations", self.inner.checkpoint_activations)

    def also(self) -> Sequence[AdapterConfig]:
        return self._sequence("also", self.inner.also, AdapterConfig)

    def class_names(self) -> Sequence[str]:
        return self._sequence("class_names", self.inner.class_names, str)

    def extra_modules(self) -> Mapping[str, nn.Module]:
        found = self._ask("extra_modules", self.inner.extra_modules)
        if not isinstance(found, Mapping) or not all(isinstance(module, nn.Module) for module in found.values()):
            raise self._wrong("extra_modules", found, "a dict of file name -> torch module")
        if unfit := [n for n in found if not isinstance(n, str) or not _NAME.fullmatch(n) or n in _OURS]:
            taken = ", ".join(sorted(_OURS))
            raise self._broken(
                f"extra_modules names a file {unfit[0]!r}; use letters, digits, '_' and '-', and none of {taken}"
            )
        return found

    def evaluate(self) -> Mapping[str, float]:
        found = self._ask("evaluate", self.inner.evaluate)
        if isinstance(found, Mapping) and all(isinstance(value, (int, float)) for value in found.values()):
            return found
        raise self._wrong("evaluate", found, "a dict of name -> number (of a tensor: .item())")

    def measures(self) -> Collection[str] | None:
        found = self._ask("measures", self.inner.measures)
        if found is None or (isinstance(found, Collection) and all(isinstance(name, str) for name in found)):
            return found
        raise self._wrong("measures", found, "names, or None")

    def samples(self) -> Sequence[Sample]:
        return self._sequence("samples", self.inner.samples, Sample)

    def generate(self, sample: Sample, path: Path) -> None:
        self._ask("generate", self.inner.generate, sample, path)
        if not path.is_file():
            raise self._broken(f"generate has written no file at {path}, the path that it was given")

    def prepare_generation(self, model: Any, device: torch.device) -> None:
        self._ask("prepare_generation", self.inner.prepare_generation, model, device)

    def recall(self, classes: Sequence[str]) -> None:
        self._ask("recall", self.inner.recall, classes)

    def predict(self, inputs: Sequence[Path]) -> Iterator[Prediction]:
        found, end = self._ask("predict", lambda: iter(self.inner.predict(inputs))), object()
        while (one := self._ask("predict", next, found, end)) is not end:
            if not isinstance(one, Prediction):
                raise self._wrong("predict", one, "Predictions")
            yield one

    def finish(self, samples: Path) -> Mapping[str, Any]:
        found = self._ask("finish", self.inner.finish, samples)
        if not isinstance(found, Mapping):
            raise self._wrong("finish", found, "a dict of figures")
        return found

    def exports(self) -> Sequence[str]:
        return self._sequence("exports", self.inner.exports, str)

    def triggers(self) -> Sequence[str]:
        return self._sequence("triggers", self.inner.triggers, str)

    def metadata(self) -> Mapping[str, str]:
        found = self._ask("metadata", self.inner.metadata)
        if isinstance(found, Mapping) and all(isinstance(text, str) for item in found.items() for text in item):
            return found
        raise self._wrong("metadata", found, "a dict of name -> text")

    def probe(self) -> Tensor | None:
        found = self._ask("probe", self.inner.probe)
        if found is None or isinstance(found, Tensor):
            return found
        raise self._wrong("probe", found, "a tensor, or None")

    def write_model(self, folder: Path) -> Tensor:
        found = self._ask("write_model", self.inner.write_model, folder)
        if isinstance(found, Tensor):
            return found
        raise self._wrong("write_model", found, "a tensor")

    def other_reader(self, format: str) -> OtherReader | None:
        found = self._ask("other_reader", self.inner.other_reader, format)
        if found is None or isinstance(found, OtherReader):
            return found
        raise self._wrong("other_reader", found, "an OtherReader, or None")

    def as_loaded(self) -> AbstractContextManager[object]:
        return self._ask("as_loaded", self.inner.as_loaded)

    def _ask(self, call: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (AdapterKitError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # third-party code may raise anything
            if isinstance(error, OSError) and error.errno in _FULL:
                raise
            raise self._broken(f"{call} raised {type(error).__name__}: {error}") from error

    def _sequence(self, call: str, function: Callable[[], Any], kind: type) -> Sequence[Any]:
        found = self._ask(call, function)
        if isinstance(found, Sequence) and not isinstance(found, str) and all(isinstance(one, kind) for one in found):
            return found
        raise self._wrong(call, found, f"a list of {kind.__name__}")

    def _wrong(self, call: str, found: object, expected: str) -> PluginError:
        return self._broken(f"{call} returned {found!r:.80}; expected {expected}")

    def _broken(self, message: str) -> PluginError:
        return PluginError(f"task {self.config.task!r}: {message}", self.plugin)
