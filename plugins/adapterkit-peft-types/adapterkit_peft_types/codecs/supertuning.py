"""Super-Tuning in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError, InvalidHeaderError
from adapterkit_peft_types.codecs.base import weight_of
from adapterkit_peft_types.codecs.modules import check_shapes, field, number
from adapterkit_peft_types.codecs.whole import WholeCodec
from adapterkit_peft_types.supertuning import SuperTuning, chosen

_VALUES, _INDICES = "supertuning_values", "supertuning_indices"
_LORA = {"A": "supertuning_lora_A.weight", "B": "supertuning_lora_B.weight"}


class SuperTuningCodec(WholeCodec):
    """Values [n] at places [n] counted row by row, which the base tells where they are missing; a LoRA beside them."""

    names = frozenset({_VALUES, _INDICES, *_LORA.values()})
    types = frozenset({"supertuning"})
    peft_type, required = "SUPERTUNING", frozenset({_VALUES})
    axes: ClassVar[Mapping[str, int]] = {_VALUES: 1, _INDICES: 1, **dict.fromkeys(_LORA.values(), 2)}

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        (out, width), values = place.shape[:2], tensors[_VALUES]
        own = {"values": values, **{name: tensors[other] for name, other in _LORA.items() if other in tensors}}
        rank = len(own["A"]) if "A" in own else 0
        shapes = {"values": values.shape[:1], "A": (rank, width), "B": (out, rank)}
        check_shapes(place, context, **{name: (tensor, shapes[name]) for name, tensor in own.items()})
        sparsity, largest = float(field(context, "sparsity", 0.99)), field(context, "select_top", True)
        if not 0 <= sparsity < 1:
            raise InvalidHeaderError(f"must be at least 0 and less than 1, not {sparsity}", context.where, "sparsity")
        if int(out * width * (1 - sparsity)) != len(values):
            told = f"has {len(values)} values, and sparsity={sparsity} asks for {int(out * width * (1 - sparsity))}"
            raise CheckpointError(told, context.where, place.point.path)
        indices = tensors.get(_INDICES)
        if indices is None:
            indices = chosen(weight_of(place, context), len(values), largest=largest)
        check_shapes(place, context, supertuning_indices=(indices, (len(values),)))
        if bool(((indices < 0) | (indices >= out * width)).any()):
            told = f"supertuning_indices names a place outside of the weight {place.shape}"
            raise CheckpointError(told, context.where, place.point.path)
        config = {"sparsity": sparsity, "largest": largest, "rank": rank}
        config |= {"alpha": float(field(context, "lora_alpha", 2.0 * rank))} if rank else {}
        if context.config.get("lora_dropout"):
            context.note("Super-Tuning's lora_dropout is not read: training here has none")
        return self.at(place, Said("supertuning", config, {**own, "indices": indices.int()}), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        config = SuperTuning.from_dict(said.config)
        alpha = {"lora_alpha": number(config.scale * config.rank)} if config.rank else {}
        own = {"sparsity": config.sparsity, "select_top": config.largest, "r": config.rank or None}
        return {**own, **alpha, "save_precomputed_indices": True}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        found = {_VALUES: said.tensors["values"], _INDICES: said.tensors["indices"].to(torch.int32)}
        return found | {other: said.tensors[name] for name, other in _LORA.items() if name in said.tensors}
