"""A named adapter outside of a model, and the contract of file formats."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adapterkit.errors import CheckpointError, NonFiniteError
from adapterkit.points import Points

if TYPE_CHECKING:
    from adapterkit.formats.source import Source


@dataclass(frozen=True)
class Part:
    """What one adapter type holds of a checkpoint.

    Attributes:
        type: The adapter type's registered name.
        config: The config's fields as JSON values.
        tensors: Point id -> parameter or buffer name -> tensor, on the CPU. What all points of the part share stands
            under `shared` in the place of an id.
        settings: Point id -> the config's fields that are others there, as JSON values; see `AdapterConfig.settings`.
            Where there are any, they name the part's points, as ids; otherwise the config's `targets` do.
        distribution, version: Who provides the type.
    """

    type: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    distribution: str = ""
    version: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that is needed to put an adapter back, and to say where it came from.

    `Checkpoint.of("lora", config, tensors)` is one of a single type. `part`, `type`, `config`, `tensors` and `settings`
    are that part's: of a checkpoint of several types they are an error, so that nothing is lost unseen.

    Attributes:
        parts: One for each type in it, at points of their own. They are one adapter: they act, merge and are saved as
            one. Several types at one point are a `Union`.
        base: Component -> fingerprint of the model it was made for (`family`, `points`, `roles`, `shapes`; see
            `MappedModel.fingerprint`), never weights.
        backends: Component -> name of the backend that mapped it.
        metadata: Free text for people and tools, by name.
    """

    parts: Sequence[Part]
    base: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    backends: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, type: str, config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], **others: Any
    ) -> Checkpoint:
        """One of a single type; `others` are further fields of `Part` and of `Checkpoint`."""
        own = {key: others.pop(key) for key in list(others) if key in _PART_FIELDS}
        return cls([Part(type, config, tensors, **own)], **others)

    def replace(self, **changes: Any) -> Checkpoint:
        """A copy with other fields: of the checkpoint, or of its one part."""
        own = {key: changes.pop(key) for key in list(changes) if key in _PART_FIELDS}
        parts = [dataclasses.replace(self.part, **own)] if own else self.parts
        return dataclasses.replace(self, parts=changes.pop("parts", parts), **changes)

    @property
    def part(self) -> Part:
        """The one part.

        Raises:
            CheckpointError: There are several types, and who asks can handle one.
        """
        if len(self.parts) != 1:
            types = ", ".join(part.type for part in self.parts) or "none"
            raise CheckpointError(f"one adapter type is expected, and this adapter has {types}; native holds any")
        return self.parts[0]

    @property
    def type(self) -> str:
        """The one part's type."""
        return self.part.type

    @property
    def config(self) -> Mapping[str, Any]:
        """The one part's config."""
        return self.part.config

    @property
    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The one part's tensors."""
        return self.part.tensors

    @property
    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """The one part's settings."""
        return self.part.settings


_PART_FIELDS = frozenset(item.name for item in dataclasses.fields(Part))


@dataclass(frozen=True)
class ReadOptions:
    """How to read. A format that can be told more derives a dataclass from this; see `Format.read_options`.

    Attributes:
        strict: Whether what nothing receives is an error.
        allow_pickle: Whether a pickle of tensors may be opened, with torch's `weights_only`; otherwise it is an error.
    """

    strict: bool = True
    allow_pickle: bool = False


@dataclass(frozen=True)
class WriteOptions:
    """How to write. A format that can be told more derives a dataclass from this; see `Format.write_options`.

    Attributes:
        dtype: What floating-point tensors are written as, a last step after all that is computed; None leaves them.
        approximate: Whether what the format cannot say may be written as the nearest that it can; otherwise it is an
            error.
    """

    dtype: torch.dtype | None = None
    approximate: bool = False

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor as it is to be written: detached, on the CPU, contiguous, in `dtype` if it has floating point.

        Raises:
            NonFiniteError: A finite value of it is infinite in `dtype`.
        """
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        here = tensor.detach().to("cpu")
        cast = here.to(dtype).contiguous()
        if dtype != here.dtype and (lost := int((here.double().isfinite() & ~cast.double().isfinite()).sum())):
            most = torch.finfo(dtype).max
            raise NonFiniteError(f"{lost} of {cast.numel()} values are beyond {dtype}, which ends at {most:g}")
        return cast


@dataclass(frozen=True)
class ReadReport:
    """What a format has found in a source.

    Attributes:
        matched: The source's keys that are now in a checkpoint, or told something of it.
        unmatched: Keys that belong to no point of the model: to another part, or to a larger model.
        left_over: Keys that the format does not know.
        notes: Sentences about what was looked past, guessed or repaired.
        tool, version: What wrote it, where that is known.
        base: The base that it is for, and how that is known, where it is.
        format: The format's name; adapterkit fills it in.
        finite: Whether `read` has refused NaN and infinity itself; otherwise every value is looked at afterwards.
        fresh: Whether `read` has made every tensor, in memory that nobody else has; otherwise they are copied.
    """

    matched: Sequence[str] = ()
    unmatched: Sequence[str] = ()
    left_over: Sequence[str] = ()
    notes: Sequence[str] = ()
    tool: str = ""
    version: str = ""
    base: str = ""
    format: str = ""
    finite: bool = False
    fresh: bool = False


@dataclass(frozen=True)
class WriteReport:
    """What a format has written.

    Attributes:
        notes: Sentences about what readers must know.
        error: Of an approximate file: the largest error of an effect, relative; 0 where it is exact.
    """

    notes: Sequence[str] = ()
    error: float = 0.0


@dataclass(frozen=True)
class OtherReader:
    """Another library that reads files of adapters.

    Attributes:
        name: Its name and version.
        reading: From a file to a context in which the model computes what that library reads there.
        lacking: What would have to be installed.
        own: Whether the format is its own; otherwise it need not know it.
        usage: From a file to the line of a program that reads it there, for the model card.
    """

    name: str
    reading: Callable[[Path], AbstractContextManager[object]]
    lacking: str = ""
    own: bool = True
    usage: Callable[[Path], str] | None = None


class Format(ABC):
    """A file format. Stateless; one instance per use.

    Attributes:
        read_options, write_options: The dataclasses of what it can be told: `Adapters.load(..., key=value)`.
    """

    read_options: ClassVar[type[ReadOptions]] = ReadOptions
    write_options: ClassVar[type[WriteOptions]] = WriteOptions

    @abstractmethod
    def recognises(self, source: Source) -> bool:
        """Whether the content (never a name) is of this format. Must be quick. A CheckpointError means that it is not.

        Args:
            source: A file, a folder, or tensors in memory.
        """

    def diagnose(self, source: Source) -> None:
        """Raises what is wrong with a source that no format recognises, where this format can tell.

        Raises:
            CheckpointError: It is damaged, or known to be something else.
        """
        return

    @abstractmethod
    def read(self, source: Source, points: Points, options: ReadOptions) -> tuple[Mapping[str, Checkpoint], ReadReport]:
        """The adapters in a source by name, under "" the one of a source that holds one without a name.

        What belongs to the model is read and the rest is reported; that the rest is an error where `options.strict` is
        is seen to, as is that nothing at all belongs to the model.

        Args:
            source: A file, a folder, or tensors in memory.
            points: Those of the model that it is for; none where no model is at hand, and ids are then of the source.
            options: An instance of `read_options`.

        Raises:
            CheckpointError: Anything that is wrong with it.
        """

    def reader(self, model: Any) -> OtherReader | None:
        """The library that such files are for, where it reads them into that model, a pipeline or a module."""
        return None

    def place(self, folder: Path, title: str) -> Path:
        """What `write` writes into an empty folder: a file of that title, or the folder itself."""
        return folder / f"{title}.safetensors"

    @abstractmethod
    def write(
        self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Points, options: WriteOptions
    ) -> WriteReport | None:
        """Writes adapters into one file or folder, atomically.

        Args:
            checkpoints: By name; one that needs none is named "". `single` takes the one.
            target: The file or folder.
            points: Those of the model.
            options: An instance of `write_options`.

        Raises:
            CheckpointError: The format cannot express them; the message names formats that can.
        """


def single(checkpoints: Mapping[str, Checkpoint], where: object = None) -> Checkpoint:
    """The one checkpoint, for formats that hold no more.

    Raises:
        CheckpointError: There are several.
    """
    if len(checkpoints) != 1:
        names = ", ".join(checkpoints)
        raise CheckpointError(
            f"this format holds one adapter, not {len(checkpoints)} ({names}); native holds any", where
        )
    return next(iter(checkpoints.values()))
