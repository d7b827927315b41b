"""PVeRA in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import MissingKeysError
from adapterkit_peft_types.codecs.modules import check_shapes, dropout, field
from adapterkit_peft_types.codecs.whole import WholeCodec
from adapterkit_peft_types.pvera import PVeRA

_NAMES = {"b": "pvera_lambda_b", "d": "pvera_lambda_d"}
_SHARED = {"A": "pvera_A", "B": "pvera_B"}


class PVeRACodec(WholeCodec):
    """b [out] and d [2 r] of each module; A [2 r, widest input] and B [widest output, r] of all, or their seed."""

    names = required = frozenset(_NAMES.values())
    types = frozenset({"pvera"})
    peft_type = "PVERA"
    axes = dict.fromkeys(names, 1)
    forms = frozenset({"linear", "linear_t"})

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        own = {name: tensors[other] for name, other in _NAMES.items()}
        rank = max(own["d"].numel() // 2, 1)
        check_shapes(place, context, b=(own["b"], (place.shape[0],)), d=(own["d"], (2 * rank,)))
        saved = field(context, "save_projection", True)
        shared = context.shared.setdefault("pvera", {})
        for name, other in _SHARED.items() if saved else ():
            if other not in context.tensors:
                raise MissingKeysError(
                    f"save_projection says that {other} is there, and it is not", context.where, other
                )
            context.used.add(other)
            shared[name] = context.tensors[other]
        here = torch.tensor([place.shape[1], place.shape[0]])
        shared["widths"] = torch.maximum(shared.get("widths", here), here)
        if context.config.get("sample_at_inference"):
            context.note("PEFT draws random numbers for this PVeRA in inference too; here it computes with the mean")
        config = {
            "rank": rank,
            "d_initial": float(field(context, "d_initial", 0.1)),
            "seed": field(context, "projection_prng_key", 0),
            "save_projection": saved,
            **dropout(context, "pvera_dropout"),
        }
        return self.at(place, Said("pvera", config, own), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        config = PVeRA.from_dict(said.config)
        return {
            "r": config.rank,
            "d_initial": config.d_initial,
            "projection_prng_key": config.seed,
            "save_projection": config.save_projection,
            "pvera_dropout": config.dropout,
            "fan_in_fan_out": place.point.form == "linear_t",
        }

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        if PVeRA.from_dict(said.config).save_projection:
            context.tensors |= {other: context.shared["pvera"][name] for name, other in _SHARED.items()}
        return {other: said.tensors[name] for name, other in _NAMES.items()}
