"""DEFT and PaRa in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit_peft_types.codecs.modules import check_shapes, dropout, field, number
from adapterkit_peft_types.codecs.ranks import nominal
from adapterkit_peft_types.codecs.whole import WholeCodec

_NAMES = {"P": "deft_P", "R": "deft_R"}


class DEFTCodec(WholeCodec):
    """P [out, r] and, unless it is PaRa, R [r, in]."""

    names = frozenset(_NAMES.values())
    types = frozenset({"deft", "para"})
    peft_type, required = "DEFT", frozenset({"deft_P"})
    axes = dict.fromkeys(names, 2)
    forms = frozenset({"linear", "linear_t"})

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        own = {name: tensors[other] for name, other in _NAMES.items() if other in tensors}
        rank = own["P"].shape[-1]
        shapes = {"P": (place.shape[0], rank), "R": (rank, place.shape[1])}
        check_shapes(place, context, **{_NAMES[name]: (tensor, shapes[name]) for name, tensor in own.items()})
        config: dict[str, Any] = {
            "rank": nominal(context, rank, place.shape[0]),
            "basis": field(context, "decomposition_method", "relu"),
        }
        if "R" not in own:
            return self.at(place, Said("para", config, own), context)
        alpha = float(field(context, "alpha", 0.0))  # 0 and null are none
        config |= {"alpha": alpha or None, **dropout(context, "deft_dropout")}
        return self.at(place, Said("deft", config, own), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        alpha = said.config.get("alpha")
        return {
            "r": said.config.get("rank", 8),
            "decomposition_method": said.config.get("basis", "relu"),
            "alpha": None if alpha is None else number(alpha),
            "para": said.type == "para",
            "deft_dropout": said.config.get("dropout", 0.0),
            "fan_in_fan_out": place.point.form == "linear_t",
        }

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {other: said.tensors[name] for name, other in _NAMES.items() if name in said.tensors}
