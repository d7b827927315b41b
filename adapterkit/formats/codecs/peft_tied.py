"""LoRA, and rows, of a weight that embedding and head have: with `ensure_weight_tying` PEFT has one of it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError
from adapterkit.points import ParameterPoint

_OPTION, _TYPE = "ensure_weight_tying", "tied"
_LORA, _TRAINABLE = "lora", "trainable"
_A, _B = "A", "B"


class TiedCodec(Codec):
    """Writes what each layer would have of its own. What is read is LoRA, which calls `tied`."""

    names: frozenset[str] = frozenset()
    types = frozenset({_TYPE})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return frozenset()

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Sequence[Said]:
        return []

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        from adapterkit.formats.codecs.peft_lora import LoRACodec
        from adapterkit.formats.codecs.peft_trainable import TrainableCodec

        (place, one), *_ = said
        part, shared = one.config["part"], context.shared[_TYPE]
        config: dict[str, Any] = dict(part["config"])
        if part["type"] == _LORA and not shared.keys() - {_A, _B}:
            own = _at(place, shared)
            written = LoRACodec().write([(place, Said(_LORA, config, own))], context)
            context.config[_OPTION] = True
            return written
        if part["type"] == _TRAINABLE and config.get("rows") is not None:
            return TrainableCodec().write([(place, Said(_TRAINABLE, config, shared))], context)
        told = f"PEFT has no {part['type']} of a tied weight as one; native holds it"
        raise CheckpointError(told, context.where, place.point.path)


def tied(said: Said, place: Place, context: Context) -> Said:
    """LoRA at a layer as what it is in all that have the weight, where the file and the model say that it is one.

    Raises:
        CheckpointError: The layers' own factors differ.
    """
    if not (context.config.get(_OPTION) and place.point.tied) or said.type != _LORA or said.tensors.keys() - {_A, _B}:
        return said
    own = _at(place, said.tensors)
    known = context.shared.setdefault(_TYPE, {name: tensor.contiguous() for name, tensor in own.items()})
    if any(not torch.equal(tensor, known[name]) for name, tensor in own.items()):
        told = "the factors of layers that have one weight differ, and its config says that they are tied"
        raise CheckpointError(told, context.where, place.point.path)
    if said.config.get("dropout"):
        context.note("the dropout of a weight that several layers have is left out")
    config = {name: value for name, value in said.config.items() if name != "dropout"}
    return Said(_TYPE, {"part": {"type": _LORA, "config": config}}, {})


def _at(place: Place, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pair of factors for the first of the layers at another, or the other way round."""
    if not _is_turned(place):
        return dict(factors)
    return {_A: factors[_B].mT.contiguous(), _B: factors[_A].mT.contiguous()}


def _is_turned(place: Place) -> bool:
    """Whether it is no embedding: those come first in every model that ties its head to one."""
    return isinstance(place.point, ParameterPoint) and place.point.form != "embedding"
