"""The contract of a backend: where the injection points of a model family are, and how its attention is reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from adapterkit.contract.layouts import Repeats
from adapterkit.errors import IncompatibleTargetError
from adapterkit.points import AttentionPoint, InjectionPoint, WeightPoint

SITE = "_adapterkit_site"
"""Key in an adapted module's `__dict__` under which attachment keeps what acts there."""

CHILD = "adapterkit"
"""Name of the child module that holds the adapter modules of an adapted module."""


class Extension(Protocol):
    """What attachment offers to an attention seam."""

    def extend(
        self, keys: Tensor, values: Tensor, mask: Tensor | None, *, queries: int, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with the active adapters' positions in front, and a mask that fits them.

        Args:
            keys, values: [batch, kv_heads, length, head_dim], as the attention is about to use them.
            mask: Broadcastable to [batch, heads, queries, length]; boolean (True is visible) or additive; or None.
            queries: Number of query positions.
            causal: Whether a missing mask means causal attention (aligned to the upper left), not full attention.

        Returns:
            The same three objects where nothing is active. Otherwise the mask is explicit wherever None would be wrong.
        """
        ...

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values at the attention point, for attentions that fold them into the batch."""
        ...

    @property
    def counted(self) -> bool:
        """Whether what is put in front now counts as positions; see `AdapterModule.counted`."""
        ...

    @property
    def padded(self) -> bool:
        """Whether padding counts too, and queries stand behind what is put in front; see `AdapterModule.padded`."""
        ...

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, *, scale: float | None = None
    ) -> Tensor:
        """The attention's output with the active adapters' own attentions beside it.

        Args:
            query: [batch, heads, queries, head_dim], as the attention has used it.
            keys, values: What `extend` was given.
            output: What the attention gave: [batch, heads, queries, value_width].
            scale: On the logits; None for 1 / sqrt(head_dim).

        Returns:
            The same object as `output` where nothing is active.
        """
        ...


def extension_of(module: nn.Module) -> Extension | None:
    """What attachment has put at this attention module, or None."""
    return module.__dict__.get(SITE)


class AttentionSeam(ABC):
    """How the keys and values of one family's attention modules are reached.

    A seam must carry no state, so that an adapted model can be copied and pickled. `forward`, where it is not None,
    runs in place of the module's own forward while an adapter is active there.
    """

    forward: ClassVar[Callable[..., Any] | None] = None

    def refusal(self, module: nn.Module) -> str | None:
        """Why this module's attention cannot be extended (an implementation we cannot reach), or None."""
        return None

    def attend_refusal(self, module: nn.Module) -> str | None:
        """Why no attention can be put beside this module's, or None; None where it asks `Extension.attend` too."""
        return f"{type(self).__name__} reaches the keys and values of an attention alone, and not its output"

    def install(self, module: nn.Module) -> object:
        """Makes the module ask `extension_of(module)`. Returns what `remove` needs to restore it, picklable."""
        return None

    def remove(self, module: nn.Module, saved: object) -> None:
        """Restores the module exactly."""


PlainForward = Callable[..., Any]
"""A module-level function `(module, *args, **kwargs)`, so that it can be pickled by name."""


class Positions(Protocol):
    """What attachment offers to a `Lengthening`.

    Attributes:
        padded: Whether they stand in front of padding too; see `AdapterModule.padded`.
        pooled: See `AdapterModule.pooled`.
    """

    padded: bool
    pooled: bool

    def __call__(self, tokens: Tensor, /) -> tuple[Tensor, Tensor | None]:
        """Positions to put to a sequence [batch, length, features].

        Returns:
            [batch, positions, features]; and which of them each row sees, [batch, positions] boolean, or None for all.
        """
        ...


Lengthening = Callable[[nn.Module, Callable[..., Any], Positions, tuple[Any, ...], dict[str, Any]], Any]
"""A module-level function `(module, forward, positions, args, kwargs)`: a forward of the module on a longer sequence.

What it returns has the length that it would have without."""


Attending = Callable[[nn.Module, Positions, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""A module-level function `(module, positions, args, kwargs)`: the arguments of a module that is given what a longer
sequence became, with masks that fit it."""


Reading = Callable[[nn.Module, Callable[..., Any], Callable[[], tuple[int, int]], tuple[Any, ...], dict[str, Any]], Any]
"""A module-level function `(module, read, lengths, args, kwargs)`: what a method `read` of a module gives, without what
was put behind its tokens. `lengths()` tells, after `read` has run, how long the sequence became, and by how much."""


Counting = Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
"""A module-level function `(module, args, kwargs, *, front, padded)`: the arguments of a module with positions that
begin at `front` (see `AdapterModule.front`), and that count no padding where not `padded`.
"""


@dataclass(frozen=True)
class Projection:
    """A layer of the model that makes keys or values.

    Attributes:
        module: Of `point`.
        point: Its rows in that module.
        heads: What its output is split into.
    """

    module: nn.Module
    point: WeightPoint
    heads: int


@dataclass(frozen=True)
class Reach:
    """How adapters act at one point, where its layout alone does not tell.

    Attributes:
        seam: At an `attention` point, how its keys and values are reached.
        plain: At a weight that the model reads, what runs in place of the module's forward while an adapter acts; None
            for itself. For modules whose usual forward hands the whole parameter to a kernel: it reads piece by piece.
        lengthening: At a `tokens` point that `lengthens`, how its module runs on a longer sequence. None where the
            layout says `until`.
        attending: Paths of the modules that see what the module at this point adds, where it keeps that in what it
            returns -> how they are called. A decoder that attends to an encoder's output: there the mask is still that
            of the tokens.
        reading: Path of a method -> what it gives without the added positions, for readers of what is between the
            point's module and the layout's `until`: "forward_intermediates", "vision.forward_intermediates".
        counting: At an `attention` point, path of the module that makes positions -> how it is called while an adapter
            acts there, where a prefix would see padding in them (rotary embeddings).
        projections: At an `attention` point, the model's own layers for keys and for values, where they are known;
            filled in for every family alike.
        hides: At a whole block, whether a boolean mask that it is given is True at what is hidden, not at what is seen.
        repeats: What `Backend.repeats` says of the point; filled in too.
    """

    seam: AttentionSeam | None = None
    plain: PlainForward | None = None
    lengthening: Lengthening | None = None
    attending: Mapping[str, Attending] = field(default_factory=dict)
    reading: Mapping[str, Reading] = field(default_factory=dict)
    counting: Mapping[str, Counting] = field(default_factory=dict)
    projections: tuple[Projection, Projection] | None = None
    hides: bool = False
    repeats: Repeats | None = None


class Backend(ABC):
    """Maps the models of one family to injection points.

    Attributes:
        component: The name that a model of this family has when it stands alone (`language`, `vision`, `unet`).
        in_pipelines: Whether a model of this family counts as a component of a pipeline; if not, it has to be given
            itself.
        whole_blocks: Whether every block around sublayers takes the residual stream as its first input, and gives it
            back alone or first, so that its output is a point of the role `hidden`.
        refuses: Methods, of the model or of modules in it, that would put other layers in the place of those that
            adapters act on -> why, and what to do instead. While adapters are attached, calling one is an error.
        writes: Methods by which the model writes itself for others to load. While adapters are attached they write the
            base's own tensors, and say so; unless they are given a `state_dict`.
    """

    component: ClassVar[str] = "model"
    in_pipelines: ClassVar[bool] = True
    whole_blocks: ClassVar[bool] = False
    refuses: ClassVar[Mapping[str, str]] = {}
    writes: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        """Every point of `model`, in model order, tagged with `component`. Reads the module tree only."""

    def component_of(self, model: nn.Module) -> str:
        """The name of a model that stands alone: `component`, where the family has one word for all of its models."""
        return self.component

    def joins_pipelines(self, model: nn.Module) -> bool:
        """Whether this model counts as a component of a pipeline: `in_pipelines`, where that is so of all models."""
        return self.in_pipelines

    def remarks(self, model: nn.Module) -> Mapping[str, str]:
        """Path of a module -> why it has no more points: its attention is linear, two structures fit it, ..."""
        return {}

    def parts(self, model: nn.Module) -> Mapping[str, str]:
        """The models inside this one that are what they would be alone: towers, a model that another one wraps.

        Each is mapped by the backend that claims its class. Of a model that stands alone they are components, whose
        points have the ids that they have in the part alone, so that files move between both; in a pipeline their
        points have the name as the tag `tower`, and in front of their sites. What `points` gives there is left out.

        Returns:
            Name of the component -> path of the module below `model`. None of them is inside another one; what is in
            them is for their own backends to tell. Reads the module tree only.
        """
        return {}

    def withheld(self, model: nn.Module, part: str, point: InjectionPoint) -> str | None:
        """Why a point that the part at a path has alone is none in this model; None where it is one.

        Args:
            model: The model around.
            part: Path of the part in it.
            point: As the part alone has it.
        """
        return None

    def repeats(self, model: nn.Module, point: InjectionPoint) -> Repeats | None:
        """How the rows at a point become more than the samples that a user thinks of, so that routes can follow.

        Returns:
            "each" where generation makes several rows of every sample, one after the other (beams, several results);
            "whole" where a pipeline repeats the whole batch, for guidance; None where rows are samples, or not known.
        """
        return None

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        """How adapters act at a point. Asked at `attention` and `tokens` points, whole blocks, and at read weights.

        Raises:
            IncompatibleTargetError: The family does not say how the attention at this point is reached.
        """
        if isinstance(point, AttentionPoint):
            raise IncompatibleTargetError(
                f"{type(self).__name__} cannot extend the attention at {point.id}: its reach() gives no seam"
            )
        return Reach()

    def untying(self, model: nn.Module, names: Sequence[Sequence[str]]) -> Callable[[], None] | None:
        """What tells a model that parameters, which were one, have values of their own from now on.

        Without it, a model that ties them when it is made or loaded would lose all but one of the values.

        Args:
            model: The model, as it was found.
            names: Of each such parameter all its names in the model.

        Returns:
            A function that tells the model, so that what is saved of it is read back as it is; None where it cannot be
            told.
        """
        return None
