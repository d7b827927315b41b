"""TinyLoRA in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError, InvalidHeaderError, MissingKeysError
from adapterkit_peft_types.codecs.modules import check_shapes, dropout, field
from adapterkit_peft_types.codecs.ranks import nominal
from adapterkit_peft_types.codecs.whole import WholeCodec
from adapterkit_peft_types.tinylora import TinyLoRA, group_of

_NAMES = {"A": "tinylora_A", "B": "tinylora_B", "P": "tinylora_P"}
_V = "tinylora_v."


class TinyLoRACodec(WholeCodec):
    """A [r, in], B [out, r] and P [u, r, r] of each module, or P's seed; v [u] of each group of modules."""

    names = frozenset(_NAMES.values())
    types = frozenset({"tinylora"})
    peft_type, required = "TINYLORA", frozenset({"tinylora_A", "tinylora_B"})
    axes: ClassVar[Mapping[str, int]] = {"tinylora_A": 2, "tinylora_B": 2, "tinylora_P": 3}
    forms = frozenset({"linear", "linear_t"})

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        modules = [path for path, names in context.modules.items() if self.required <= names]
        if place.point.path not in modules:
            told = "which group a module is of, its place among the model's tells: load it onto its model"
            raise CheckpointError(told, context.where, place.point.path)
        index, tying = modules.index(place.point.path), float(field(context, "weight_tying", 0.0))
        if not 0 <= tying <= 1:
            raise InvalidHeaderError(f"must be from 0 to 1, not {tying}", context.where, "weight_tying")
        group = group_of(index, len(modules), tying)
        if f"{_V}{group}" not in context.tensors:
            raise MissingKeysError("the numbers of its group are missing", context.where, f"{_V}{group}")
        v = context.tensors[f"{_V}{group}"]
        own = {name: tensors[other] for name, other in _NAMES.items() if other in tensors}
        rank, numbers = own["A"].shape[0], v.numel()
        if "P" not in own:
            own["P"] = _drawn(numbers, rank, field(context, "projection_seed", 42) + index)
        shapes = {"A": (rank, place.shape[1]), "B": (place.shape[0], rank), "P": (numbers, rank, rank)}
        check_shapes(place, context, **{_NAMES[name]: (own[name], shape) for name, shape in shapes.items()})
        context.used.add(f"{_V}{group}")
        context.shared.setdefault("tinylora", {})[f"v.{group}"] = v
        config = {
            "rank": nominal(context, rank, min(place.shape[:2])),
            "numbers": numbers,
            "tying": tying,
            "group": group,
        }
        return self.at(place, Said("tinylora", {**config, **dropout(context, "tinylora_dropout")}, own), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        config = TinyLoRA.from_dict(said.config)
        return {
            "r": config.rank,
            "u": config.numbers,
            "weight_tying": config.tying,
            "save_projection": True,
            "tinylora_dropout": config.dropout,
            "fan_in_fan_out": place.point.form == "linear_t",
        }

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        config, shared = TinyLoRA.from_dict(said.config), context.shared.get("tinylora", {})
        before = sum(name.startswith(_V) for name in context.tensors)  # modules are written in the model's order
        group = config.group or {0.0: str(before), 1.0: "0"}.get(config.tying, "")
        if f"v.{group}" not in shared:
            told = f"tying={config.tying} does not tell which group it is of: give points a group each"
            raise CheckpointError(f"{told}; native holds it", context.where, place.point.id)
        context.tensors[f"{_V}{group}"] = shared[f"v.{group}"]
        return {other: said.tensors[name] for name, other in _NAMES.items()}


def _drawn(numbers: int, rank: int, seed: int) -> Tensor:
    """P as PEFT draws it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.normal(0.0, rank**-0.5, size=(numbers, rank, rank), generator=generator)
