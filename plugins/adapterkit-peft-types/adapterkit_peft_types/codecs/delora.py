"""DeLoRA in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.points import WeightLayout
from adapterkit_peft_types.codecs.modules import ModuleCodec, as_lora, check_shapes, dropout, field, number
from adapterkit_peft_types.delora import DeLoRA, update

_NAMES = {"A": "delora_A", "B": "delora_B", "bound": "delora_lambda", "norms": "delora_w_norm"}


class DeLoRACodec(ModuleCodec):
    """A [r, in], B [out, r], the bound [1], and the norms [in] of the base's columns as they were."""

    names = frozenset(_NAMES.values())
    types = frozenset({"delora"})
    peft_type, required = "DELORA", names
    axes: ClassVar[Mapping[str, int]] = {"delora_A": 2, "delora_B": 2, "delora_lambda": 1, "delora_w_norm": 1}

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (tensors["delora_B"].shape[0], *tensors["delora_A"].shape[1:])

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        own = {name: tensors[other] for name, other in _NAMES.items()}
        out, width = place.shape[:2]
        rank = own["A"].shape[0]
        shapes = {"A": (rank, width), "B": (out, rank), "bound": (1,), "norms": (width,)}
        check_shapes(place, context, **{_NAMES[name]: (own[name], shape) for name, shape in shapes.items()})
        if not place.whole:
            factors = update(own["A"], own["B"], own["bound"], own["norms"], WeightLayout("linear"))
            return as_lora(factors, place, context, "DeLoRA")
        bound = float(field(context, "delora_lambda", DeLoRA.bound)) if context.config else own["bound"].item()
        return Said("delora", {"rank": rank, "bound": bound or DeLoRA.bound, **dropout(context, "module_dropout")}, own)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        return {
            "r": said.config["rank"],
            "delora_lambda": number(said.config.get("bound", DeLoRA.bound)),
            "rank_pattern": {},
            "module_dropout": said.config.get("dropout", 0.0),
        }

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {other: said.tensors[name] for name, other in _NAMES.items()}
