"""Poly in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit_peft_types.codecs.modules import check_shapes, field
from adapterkit_peft_types.codecs.whole import WholeCodec

_NAMES = {"A": "poly_lora_A", "B": "poly_lora_B", "logits": "poly_router.module_logits"}


class PolyCodec(WholeCodec):
    """A [splits, skills, in / splits, r], B [splits, skills, r, out / splits] and the logits [tasks, splits skills]."""

    names = required = frozenset(_NAMES.values())
    types = frozenset({"poly"})
    peft_type = "POLY"
    axes: ClassVar[Mapping[str, int]] = {"poly_lora_A": 4, "poly_lora_B": 4, "poly_router.module_logits": 2}

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        own = {name: tensors[other] for name, other in _NAMES.items()}
        (splits, skills, _, rank), tasks = own["A"].shape, len(own["logits"])
        (out, width), many = place.shape[:2], (splits, skills)
        shapes = {
            "A": (*many, width // splits, rank),
            "B": (*many, rank, out // splits),
            "logits": (tasks, splits * skills),
        }
        check_shapes(place, context, **{_NAMES[name]: (own[name], shape) for name, shape in shapes.items()})
        field(context, "poly_type", "poly")
        context.note("PEFT's task_ids are the side input task: with adapters.context(task=ids)")
        config = {"rank": rank, "tasks": tasks, "skills": skills, "splits": splits}
        return self.at(place, Said("poly", config, own), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        config = {"rank": 8, "tasks": 1, "skills": 4, "splits": 1, **said.config}
        return {"r": config["rank"], **{f"n_{name}": config[name] for name in ("tasks", "skills", "splits")}}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {other: said.tensors[name] for name, other in _NAMES.items()}
