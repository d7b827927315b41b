"""GraLoRA in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.contract.factors import Factors
from adapterkit.points import WeightLayout
from adapterkit_peft_types.codecs.modules import ModuleCodec, as_lora, check_shapes, dropout, field, number
from adapterkit_peft_types.gralora import widened

_NAMES = {"A": "gralora_A", "B": "gralora_B"}
_WHOLE = {"A_whole": "gralora_A_general.weight", "B_whole": "gralora_B_general.weight"}


class GraLoRACodec(ModuleCodec):
    """A [k, in / k, r] and B [k, r, out / k]; with a hybrid rank h also [h, in] and [out, h]. The config has alpha."""

    required = frozenset(_NAMES.values())
    names = required | frozenset(_WHOLE.values())
    types = frozenset({"gralora"})
    peft_type = "GRALORA"
    axes: ClassVar[Mapping[str, int]] = {"gralora_A": 3, "gralora_B": 3, **dict.fromkeys(_WHOLE.values(), 2)}
    forms = frozenset({"linear", "linear_t"})

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        a, b = tensors["gralora_A"], tensors["gralora_B"]
        return (len(b) * b.shape[-1], len(a) * a.shape[1])

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        own = {name: tensors[other] for name, other in {**_NAMES, **_WHOLE}.items() if other in tensors}
        (out, width), (k, _, rank) = place.shape[:2], own["A"].shape
        whole = len(own["A_whole"]) if "A_whole" in own else 0
        shapes = {
            "A": (k, width // k, rank),
            "B": (k, rank, out // k),
            "A_whole": (whole, width),
            "B_whole": (out, whole),
        }
        check_shapes(place, context, **{name: (tensor, shapes[name]) for name, tensor in own.items()})
        alpha = float(field(context, "alpha", 64.0))
        if place.whole:
            config = {"rank": rank, "blocks": k, "whole": whole, "alpha": alpha}
            return Said("gralora", {**config, **dropout(context, "gralora_dropout")}, own)
        a, b = widened(own["A"], own["B"])
        if whole:
            a, b = torch.cat([a, own["A_whole"]]), torch.cat([b, own["B_whole"]], dim=1)
        factors = Factors(a, b, WeightLayout("linear"), alpha / (rank + whole))
        return as_lora(factors, place, context, "GraLoRA")

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        config = {"blocks": 2, "whole": 0, "alpha": None, "dropout": 0.0, **said.config}
        rank, whole = config["rank"], config["whole"]
        return {
            "r": rank,
            "gralora_k": config["blocks"],
            "hybrid_r": whole,
            "alpha": number(rank + whole if config["alpha"] is None else config["alpha"]),
            "gralora_dropout": config["dropout"],
            "fan_in_fan_out": place.point.form == "linear_t",
        }

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {other: said.tensors[name] for name, other in {**_NAMES, **_WHOLE}.items() if name in said.tensors}
