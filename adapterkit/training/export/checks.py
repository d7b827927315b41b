"""Whether an exported file is what was trained: it is read back, here and by the library that it is for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import AdapterKitError
from adapterkit.formats.registry import NamedFormat
from adapterkit.handle.adapters import Adapters
from adapterkit.training.task import Task

TOLERANCE = 0.05
_NAME = "exported"


@dataclass(frozen=True)
class Check:
    """What a reader makes of a file.

    Attributes:
        reader: Who read it, with its version.
        error: How far what it computes is from what was trained, relative to what the adapter changes; None where the
            task has nothing to compare.
        problem: Why there is nothing to compare.
        lacking: What would have to be installed for it to be asked.
        unknown: Whether it does not know the format, which is another's, for such a model.
        notes: What it says of the file, such as who else misreads it.
    """

    reader: str
    error: float | None = None
    problem: str = ""
    lacking: str = ""
    unknown: bool = False
    notes: Sequence[str] = ()

    @property
    def agrees(self) -> bool:
        """Whether it computes what was trained, but for rounding."""
        return self.unknown or (not self.problem and (self.error is None or self.error <= TOLERANCE))

    def __str__(self) -> str:
        if self.lacking:
            return f"{self.reader} was not asked: pip install {self.lacking}"
        if self.unknown:
            why = f" ({self.problem})" if self.problem else ""
            return f"{self.reader} does not read this format for such a model{why}"
        if self.problem:
            return f"{self.reader} CANNOT READ IT: {self.problem}"
        if self.error is None:
            return f"{self.reader} reads it"
        told = "agrees" if self.agrees else "DIFFERS"
        return f"{self.reader} {told} ({self.error:.1%} of the effect apart)"


class Checks:
    """Reads files into one model, which has no adapter between the checks.

    Args:
        task: Says what to compare.
        model: The base.
        trained: The adapter.
        own: Who reads here.
    """

    def __init__(self, task: Task, model: Any, trained: Checkpoint, own: str) -> None:
        self._task, self._model, self._own = task, model, own
        self._base = task.probe()
        with self._attached() as adapters:
            adapters.install(_NAME, trained)
            adapters.activate(_NAME)
            self._wanted = task.probe()

    def of(self, format: NamedFormat, path: Path) -> Sequence[Check]:
        """What every reader makes of a file."""
        ours = self._by_us(path)
        theirs = self._by_others(format, path, whole=ours.agrees)
        return [ours] if theirs is None else [ours, theirs]

    def _by_us(self, path: Path) -> Check:
        try:
            with self._attached() as adapters:
                report = adapters.load(path, _NAME)
                adapters.activate(_NAME)
                return Check(self._own, self._apart(self._task.probe()), notes=report.notes)
        except AdapterKitError as error:
            return Check(self._own, problem=str(error))

    def _by_others(self, format: NamedFormat, path: Path, *, whole: bool) -> Check | None:
        """What the other library makes of a file; of a whole one in a format of others it need make nothing."""
        reader, as_loaded = self._task.other_reader(format.spec.name), contextlib.nullcontext()
        if reader is None:
            reader, as_loaded = format.reader(self._model), self._task.as_loaded()
        if reader is None:
            return None
        if reader.lacking:
            return Check(reader.name, lacking=reader.lacking)
        try:
            with as_loaded, reader.reading(path):
                found = self._task.probe()
        except Exception as error:  # noqa: BLE001 - what another library raises is what was to be found
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return Check(reader.name, problem=told, unknown=whole and not reader.own)
        if whole and not reader.own and found is not None and self._base is not None and torch.equal(found, self._base):
            return Check(reader.name, unknown=True)
        return Check(reader.name, self._apart(found))

    @contextlib.contextmanager
    def _attached(self) -> Iterator[Adapters]:
        adapters = Adapters(self._model)
        try:
            yield adapters
        finally:
            adapters.detach()

    def _apart(self, found: Tensor | None) -> float | None:
        if found is None or self._wanted is None or self._base is None:
            return None
        difference, effect = torch.dist(found, self._wanted), torch.dist(self._base, self._wanted)
        if not difference:
            return 0.0
        return float(difference / effect.clamp_min(torch.finfo(effect.dtype).tiny))
