"""The contract of codecs: how one adapter type is written, module by module, in one family of files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.checkpoint import WriteOptions
    from adapterkit.contract.view import ModelView
    from adapterkit.points import InjectionPoint

Rows = slice | Sequence[int]
"""Which rows of a foreign module are a point's, in the point's order."""


@dataclass(frozen=True)
class Place:
    """One of our points, seen from the foreign module whose tensors act there.

    Attributes:
        point: The point; a `ParameterPoint` but where a type acts at attentions or at the embedded sequence. Where no
            model is at hand it is made up: its path is the module's name in the file.
        shape: Of the foreign module's weight as adapters see it, [out, in / groups, *kernel]; else the point's own.
        rows: The module's output rows that are the point's, one of several in a fused projection; None for all.
        columns: The inputs that are the point's, likewise.
        model: The model at hand, or None.
        stack: How many weights the parameter holds of which the point has one (experts); 0 where it is no stack.
        fused: The point of the module itself, where `point` is one of its parts.
    """

    point: InjectionPoint
    shape: tuple[int, ...]
    rows: Rows | None = None
    columns: Rows | None = None
    model: ModelView | None = None
    stack: int = 0
    fused: InjectionPoint | None = None

    def of_rows(self, tensor: Tensor, axis: int = 0) -> Tensor:
        """The point's part of a tensor whose `axis` follows the module's outputs."""
        return _taken(tensor, self.rows, axis)

    def of_columns(self, tensor: Tensor, axis: int = 1) -> Tensor:
        """The point's part of a tensor whose `axis` follows the module's inputs."""
        return _taken(tensor, self.columns, axis)

    @property
    def whole(self) -> bool:
        """Whether the point is the module."""
        return self.rows is None and self.columns is None

    def of_all(self) -> Place | None:
        """The place of the module itself; None where it has no point of its own."""
        return None if self.fused is None else replace(self, point=self.fused, rows=None, columns=None, fused=None)


def _taken(tensor: Tensor, places: Rows | None, axis: int) -> Tensor:
    if places is None:
        return tensor
    if isinstance(places, slice):
        start, stop, _ = places.indices(tensor.shape[axis])
        return tensor.narrow(axis, start, stop - start)
    return tensor[(*(slice(None),) * axis, list(places))]


@dataclass(frozen=True)
class Said:
    """What a module's tensors say at one point.

    Attributes:
        type: An adapter type's registered name.
        config: The config's fields that the file tells, as JSON values: `{"rank": 4, "alpha": 2.0}`. What differs from
            point to point becomes settings.
        tensors: Parameter or buffer -> tensor, as the type's module keeps it.
    """

    type: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass
class Context:
    """What is the same for all modules of a file that is read or written.

    Attributes:
        where: What errors name.
        config: What the file says for all of its modules (a PEFT adapter_config.json); what applies to a module alone
            (a pattern of ranks) has been put in its place for it. Where a module is written, the codec puts in what the
            file is to say for it.
        tensors: Those that belong to no module, by name. Where something is written, a codec puts them in.
        shared: Type -> tensors that all of its points share. A codec that reads `tensors` puts them here.
        notes: Sentences for the report, in order, each once.
        used: Names of `tensors` that a codec has read.
        options: Where something is written, how.
        modules: Where a file is read: path of each of the model's modules that it has something for -> the names of
            the tensors, in the model's order.
        made: Where something is written, what was made of configs so far; see `low_rank.module_of`.
    """

    where: object = None
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    options: WriteOptions | None = None
    modules: Mapping[str, Set[str]] = field(default_factory=dict)
    made: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    def note(self, sentence: str) -> None:
        """Adds to the report."""
        self.notes[sentence] = None


class Codec(ABC):
    """How one adapter type is said for one module. Stateless.

    Attributes:
        names: Every tensor name behind a module's name that it may read or write: `lora_down.weight`, `alpha`.
        axes: How many axes tensors have, by name; another number, or nothing in them, is an error before the codec is
            asked. Names that are not in it are not looked at.
        types: The registered names of the adapter types that it writes.
        writes_factors: Whether it writes every other type too that gives `AdditiveModule.factors()` at a point.
        whole: Whether its tensors belong to no module: it reads them at every point that has no weight (attentions, the
            embedded sequence), with nothing to say where they are not meant, and writes all of its points at once.
    """

    names: ClassVar[frozenset[str]]
    axes: ClassVar[Mapping[str, int]] = {}
    types: ClassVar[frozenset[str]] = frozenset()
    writes_factors: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    def check(self, context: Context) -> None:
        """Looks at a file before anything of it is read.

        Raises:
            CheckpointError: It is of a kind that the codec knows and that cannot be read; the message tells why.
        """

    @abstractmethod
    def takes(self, names: Set[str], context: Context) -> Set[str]:
        """Those of a module's tensor names that it reads together; empty where they are not of its type.

        Args:
            names: What the module has, of those in `names` of any codec.
            context: The file.
        """

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        """The shape of the weight that tensors are for, [out, in / groups, *kernel]; None where they do not tell."""
        return None

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the tensors have no parts that are for some rows of a module, as a rotation of all of them.

        They are then read at the module's own point (`fused.*`) where the model has one. A foreign module that is
        several of ours has none: the codec is asked for each, and says what it can or raises.
        """
        return False

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said | Sequence[Said]:
        """What the tensors say at a place; several things where several types are needed, none where it says nothing.

        It is called for each point of a fused module.

        Raises:
            CheckpointError: They do not fit together, or say what no type here can.
        """

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        """A module's tensors by name, from what is said at its points; exact, or an error.

        Args:
            said: The module's points that the adapter has, in order of rows; all of types in `types`.
            context: The file.

        Raises:
            CheckpointError: It cannot be said exactly. The message tells which format can.
        """
        raise CheckpointError(f"{said[0][1].type} cannot be written by {type(self).__name__}", context.where)
