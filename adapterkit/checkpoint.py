"""A named adapter outside of a model, and the contract of file formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from adapterkit.errors import CheckpointError
from adapterkit.points import Points


@dataclass(frozen=True)
class Checkpoint:
    """Everything that is needed to put an adapter back, and to say where it came from.

    Attributes:
        type: The adapter type's registered name.
        config: The config's fields as JSON values.
        tensors: Point id -> parameter or buffer name -> tensor, on the CPU. What all points share stands under
            `shared` in the place of an id.
        distribution, version: Who provides the type.
        base: Component -> fingerprint of the model it was made for (`family`, `points`, `shapes`), never weights.
        backends: Component -> name of the backend that mapped it.
        metadata: Free text for people and tools.
    """

    type: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]
    distribution: str = ""
    version: str = ""
    base: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    backends: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


class Format(ABC):
    """A file format. Stateless; one instance per use."""

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether the file's content (never its name) is of this format. Must be quick and must not raise."""

    def diagnose(self, path: Path) -> None:
        """Raises what is wrong with a file that no format recognises, where this format can tell.

        Raises:
            CheckpointError: The file is damaged, or known to be something else.
        """
        return

    @abstractmethod
    def read(self, path: Path, points: Points) -> Checkpoint:
        """The adapter in the file; `points` are those of the model that it is for.

        Raises:
            CheckpointError: Anything that is wrong with the file.
        """

    def read_many(self, path: Path, points: Points) -> dict[str, Checkpoint]:
        """Name -> adapter for every adapter in the file; under "" the one of a file that holds one without a name."""
        return {"": self.read(path, points)}

    def write_many(self, checkpoints: Mapping[str, Checkpoint], path: Path, points: Points) -> None:
        """Writes several adapters into one file, atomically.

        Raises:
            CheckpointError: The format cannot; so it is unless a format overrides this.
        """
        names = ", ".join(checkpoints)
        raise CheckpointError(
            f"this format holds one adapter, not {len(checkpoints)} ({names}); native holds any", path
        )

    @abstractmethod
    def write(self, checkpoint: Checkpoint, path: Path, points: Points) -> None:
        """Writes the adapter, atomically.

        Raises:
            CheckpointError: The format cannot express this adapter; the message names formats that can.
        """
