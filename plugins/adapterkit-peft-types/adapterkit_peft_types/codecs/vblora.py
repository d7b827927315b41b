"""VB-LoRA in files of PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError, MissingKeysError
from adapterkit_peft_types.codecs.modules import check_shapes, dropout, field
from adapterkit_peft_types.codecs.whole import WholeCodec
from adapterkit_peft_types.vblora import VBLoRA

_BANK = "vblora_vector_bank"
_LOGITS = {"logits_A": "vblora_logits_A", "logits_B": "vblora_logits_B"}
_CHOSEN = {f"{kind}_{x}": f"vblora_logits_{x}_topk_{kind}" for x in "AB" for kind in ("indices", "weights")}


class VBLoRACodec(WholeCodec):
    """Logits A [r, in / length, number] and B [out / length, r, number], or the choice that they make; and one bank."""

    names = frozenset((*_LOGITS.values(), *_CHOSEN.values()))
    axes = dict.fromkeys(names, 3)
    types = frozenset({"vblora"})
    peft_type = "VBLORA"
    forms = frozenset({"linear", "linear_t"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        every = ({*_LOGITS.values()}, {*_CHOSEN.values()})
        return next((one for one in every if one <= names), frozenset())

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        bank = context.tensors.get(_BANK)
        if bank is None or bank.ndim != 2 or not bank.numel():
            raise MissingKeysError(f"has no {_BANK} [number, length]", context.where, _BANK)
        context.used.add(_BANK)
        context.shared["vblora"] = {"vectors": bank}
        (number, length), chosen = bank.shape, _CHOSEN["indices_A"] in tensors
        own = {name: tensors[other] for name, other in (_CHOSEN if chosen else _LOGITS).items()}
        rank = len(own["indices_A" if chosen else "logits_A"])
        k = own["indices_A"].shape[-1] if chosen else field(context, "topk", 2)
        a = (rank, math.prod(place.shape[1:]) // length)
        b = (place.shape[0] // length, rank)
        last = {"logits": number, "indices": k, "weights": k - 1}
        shapes = {name: (t, (*(a if name.endswith("A") else b), last[name[:-2]])) for name, t in own.items()}
        check_shapes(place, context, **shapes)
        if chosen:
            own = {name: t.long() if name.startswith("indices") else t for name, t in own.items()}
            for indices in (own["indices_A"], own["indices_B"]):
                if bool(((indices < 0) | (indices >= number)).any()):
                    raise CheckpointError(f"names a vector beyond the bank's {number}", context.where, place.point.path)
        sizes = {"rank": rank, "vectors": number, "length": length, "k": k, "chosen": chosen}
        return self.at(place, Said("vblora", {**sizes, **dropout(context, "vblora_dropout")}, own), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        number, length = context.shared["vblora"]["vectors"].shape
        config = VBLoRA.from_dict(said.config)
        context.tensors[_BANK] = context.shared["vblora"]["vectors"]
        return {
            "r": config.rank,
            "num_vectors": number,
            "vector_length": length,
            "topk": config.k,
            "save_only_topk_weights": config.chosen,
            "vblora_dropout": config.dropout,
            "fan_in_fan_out": place.point.form == "linear_t",
        }

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        number = len(context.shared["vblora"]["vectors"])
        names = _CHOSEN if said.config.get("chosen") else _LOGITS
        found = {other: said.tensors[name] for name, other in names.items()}
        small = next(d for d, n in ((torch.uint8, 8), (torch.int16, 15), (torch.int32, 31)) if number < 2**n)
        return {name: tensor if tensor.is_floating_point() else tensor.to(small) for name, tensor in found.items()}
