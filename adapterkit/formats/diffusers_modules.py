"""The modules of an adapter as diffusers' loaders want them: whose they are, their names, tensors and fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.codec import Context, Place, Said
from adapterkit.contract.naming import Piece
from adapterkit.contract.view import ComponentView
from adapterkit.errors import CheckpointError
from adapterkit.formats.dialect import Dialect
from adapterkit.formats.diffusers_keys import STYLE
from adapterkit.formats.foreign_names import ForeignNames
from adapterkit.formats.module_writing import Writing
from adapterkit.formats.modules import MADE_UP, Modules
from adapterkit.formats.pipeline_parts import part_of
from adapterkit.formats.prefixes import DENOISER
from adapterkit.points import Points

TYPES = frozenset({"lora", "dora"})
"""What diffusers reads, of all that PEFT has."""
TEXTS = ("text_encoder", "text_encoder_2")
_BOTH = frozenset(TEXTS)
_FIRST = frozenset(TEXTS[:1])
_TEXTS_BESIDE = {
    "diffusers:UNet2DConditionModel": _BOTH,
    "diffusers:UNet3DConditionModel": _FIRST,
    "diffusers:SD3Transformer2DModel": _BOTH,
    "diffusers:FluxTransformer2DModel": _FIRST,
    "diffusers:ChromaTransformer2DModel": _FIRST,
    "diffusers:UVit2DModel": _FIRST,
}
"""Which text encoders' LoRA pipelines load, by the model beside them; beside others, none."""
_DENOISERS = frozenset({"unet", "transformer", "connectors", "text_conditioner"})
"""The other components whose LoRA pipelines load; of the rest, the model itself does."""
_WEIGHT = "weight"


@dataclass
class Module:
    """What is written for one module.

    Attributes:
        prefix: What stands in front of its keys: a component's name and a dot, or nothing.
        name: Its name behind it.
        tensors: By name behind that.
        config: What its codec tells the metadata.
        shift: What is added to its output beside.
    """

    prefix: str
    name: str
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    shift: Tensor | None = None

    @property
    def is_text(self) -> bool:
        """Whether it is a text encoder's."""
        return self.prefix.removesuffix(".") in TEXTS

    @property
    def scale(self) -> float:
        """On the product of its factors."""
        return self.config["lora_alpha"] / self.config["r"]


class ModuleWriting(Writing):
    """Writes modules of LoRA and DoRA, with the change of a bias beside them.

    Args:
        checkpoint: The adapter.
        points: The model's.
        context: How it is written.
        rank: Of what is approximated.

    Attributes:
        names: Prefix -> the names of all modules behind it; of those that no model is at hand for, none.
    """

    def __init__(self, checkpoint: Checkpoint, points: Points, context: Context, rank: int | None = None) -> None:
        super().__init__(checkpoint, points, Dialect("peft", TYPES), context, rank)
        self.names: dict[str, list[str]] = {}
        self._found: dict[str, Module] = {}

    def all(self) -> list[Module]:
        """What is written.

        Raises:
            CheckpointError: Something of it cannot be said; the message tells what can.
        """
        return [self._found[name] for name in self.modules(lambda component, part: str, STYLE)]

    def _places(self, *_: object) -> Iterator[tuple[str, Sequence[Place]]]:
        if self._points.model is None:
            yield from self._made_up()
            return
        modules, components = Modules(self._points), self._points.model.components
        touched = {(point.model, point.path) for point in self._points if point.id in self._said}
        for component in (one for name, one in components.items() if any(name == own for own, _ in touched)):
            prefix = self._prefix(component, components)
            for name, pieces in _written_names(component, components):
                self.names.setdefault(prefix, []).append(name)
                own = [one for piece in pieces for one in modules.paths(component.name).get(piece.path, ())]
                if any((one.component, one.path) in touched for one in own if one.parameter == _WEIGHT):
                    yield self._label(prefix, name), modules.placed(component.name, pieces) or ()

    def _made_up(self) -> Iterator[tuple[str, Sequence[Place]]]:
        for point in self._points:
            if point.id in self._said and point.role in MADE_UP and point.model in (*_DENOISERS, *TEXTS, DENOISER):
                prefix = "" if point.model == DENOISER else f"{point.model}."
                yield self._label(prefix, point.path), [Place(point, point.shape)]

    def _label(self, prefix: str, name: str) -> str:
        self._found[f"{prefix}{name}"] = Module(prefix, name)
        return f"{prefix}{name}"

    def _prefix(self, component: ComponentView, components: Mapping[str, ComponentView]) -> str:
        name, part = component.name, part_of(component, components)
        if len(components) == 1:
            name = name if part == DENOISER else part
            return f"{name}." if name in (*_DENOISERS, *TEXTS) else ""  # as `save_lora_adapter` has it
        if part != DENOISER and name not in _texts_beside(components):
            told = f"diffusers loads no LoRA of {name!r} beside such a model"
            raise CheckpointError(f"{told}; native holds it, and kohya and comfy do", self._context.where, name)
        if part == DENOISER and name not in _DENOISERS:
            call = f"pipe.{name}.load_lora_adapter(file, prefix={name!r})"
            self._context.note(f"diffusers' pipelines look past {name}, whose part is loaded by {call}")
        return f"{name}."

    def _written(self, name: str, touched: Sequence[tuple[Place, Sequence[Said]]]) -> Mapping[str, Tensor]:
        module = self._found[name]
        shifts = [(place, one) for place, own in touched for one in own if _is_shift(one)]
        rest = [(place, left) for place, own in touched if (left := [one for one in own if not _is_shift(one)])]
        if not rest:
            told = "a change of a bias needs LoRA of the same layer; native and peft hold it alone"
            raise CheckpointError(told, self._context.where, name)
        self._context = dataclasses.replace(self._context, config={})
        module.tensors = dict(super()._written(name, rest))
        module.config = self._context.config
        if shifts:
            module.shift = _joined(shifts, self._context.where)
        return module.tensors


def _written_names(
    component: ComponentView, components: Mapping[str, ComponentView]
) -> Iterator[tuple[str, Sequence[Piece]]]:
    """The library's names; of CLIP's text encoders, those that files have had before transformers changed them."""
    if part_of(component, components) == DENOISER:
        return ((path, (Piece(path),)) for path in component.paths if path)
    return ForeignNames(component).written(STYLE)


def _texts_beside(components: Mapping[str, ComponentView]) -> frozenset[str]:
    classes = [cls for one in components.values() for cls in one.classes]
    return frozenset().union(*(_TEXTS_BESIDE.get(cls, ()) for cls in classes))


# -- changes of biases ------------------------------------------------------------------------------------------------


def _is_shift(said: Said) -> bool:
    return said.type == "trainable" and said.config.get("part") == "bias"


def _joined(shifts: Sequence[tuple[Place, Said]], where: object) -> Tensor:
    """What is added to a module's output, from its points' parts."""
    first = shifts[0][0]
    parts = [(place, _shift(place, one, where)) for place, one in shifts]
    if len(parts) == 1 and first.whole:
        return parts[0][1]
    found = parts[0][1].new_zeros(first.shape[0])
    for place, part in parts:
        rows = slice(None) if place.rows is None else place.rows
        found[rows if isinstance(rows, slice) else list(rows)] = part
    return found


def _shift(place: Place, said: Said, where: object) -> Tensor:
    if "shift" in said.tensors:
        return said.tensors["shift"]
    if place.point.layout.bias:
        told = "the bias itself is trained, and diffusers' files have changes of it"
        raise CheckpointError(f"{told}; native and peft hold it", where, place.point.id)
    return said.tensors["bias"]


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """The tensor times a number, rounded once."""
    return tensor if scale == 1.0 else (tensor.double() * scale).to(tensor.dtype)


def loses_nothing(tensor: Tensor, scale: float) -> bool:
    """Whether no bit of a tensor is lost where it is scaled."""
    if scale == 1.0:
        return True
    return scale != 0.0 and torch.equal(scaled(scaled(tensor, scale), 1.0 / scale), tensor)
