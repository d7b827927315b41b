"""RandLoRA in files of PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError, MissingKeysError, ShapeMismatchError
from adapterkit_peft_types.codecs.modules import check_shapes, dropout, field, number
from adapterkit_peft_types.codecs.whole import WholeCodec
from adapterkit_peft_types.randlora import RandLoRA

_BASES = {"A": "randlora_A", "B": "randlora_B"}
_NAMES = {"scale": "randlora_lambda", "gamma": "randlora_gamma"}


class RandLoRACodec(WholeCodec):
    """Lambda [r, n] and gamma [n, shorter side]; the bases A and B, which every module repeats, or their seed."""

    required = frozenset(_NAMES.values())
    names = required | frozenset(_BASES.values())
    types = frozenset({"randlora"})
    peft_type = "RANDLORA"
    forms = frozenset({"linear", "linear_t"})

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        own = {name: tensors[other] for name, other in _NAMES.items()}
        sides = (place.shape[0], math.prod(place.shape[1:]))
        rank = max(own["scale"].shape[0], 1)
        bases = -(-min(sides) // rank)
        shapes = {"scale": (rank, bases), "gamma": (bases, min(sides))}
        check_shapes(place, context, **{_NAMES[name]: (own[name], shape) for name, shape in shapes.items()})
        found = _bases(tensors, context)
        if not found:
            drawn = "are not in the file, and drawn again from its seed for the widest layers that are read"
            context.note(f"RandLoRA's bases {drawn}, in bfloat16 as PEFT does where hardware has it")
        sparse = "sparse" if field(context, "sparse", False) else "no"
        config = {
            "rank": rank,
            "alpha": float(field(context, "randlora_alpha", 640.0)),
            "sparse": "very_sparse" if field(context, "very_sparse", False) else sparse,
            "seed": field(context, "projection_prng_key", 0),
            "save_bases": bool(found),
            **dropout(context, "randlora_dropout"),
        }
        _share(found, sides, context)
        return self.at(place, Said("randlora", config, own), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        config = RandLoRA.from_dict(said.config)
        return {
            "r": config.rank,
            "randlora_alpha": number(config.alpha),
            "sparse": config.sparse == "sparse",
            "very_sparse": config.sparse == "very_sparse",
            "projection_prng_key": config.seed,
            "save_projection": config.save_bases,
            "randlora_dropout": config.dropout,
            "fan_in_fan_out": place.point.form == "linear_t",
        }

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        found = {other: said.tensors[name] for name, other in _NAMES.items()}
        if RandLoRA.from_dict(said.config).save_bases:
            bases = {other: context.shared["randlora"][name] for name, other in _BASES.items()}
            context.tensors |= bases
            found |= bases
        return found


def _bases(tensors: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
    """The bases that a file has; none where it has none."""
    found: dict[str, Tensor] = {}
    for name, other in _BASES.items():
        if other in context.tensors:
            context.used.add(other)
        here = tensors.get(other, context.tensors.get(other))
        if here is not None:
            found[name] = here
    if len(found) == 1:
        raise MissingKeysError("has one of randlora_A and randlora_B without the other", context.where)
    return found


def _share(found: Mapping[str, Tensor], sides: tuple[int, int], context: Context) -> None:
    """Keeps the bases for all points, as wide as the widest of these asks: those of a file may be for more layers."""
    shared = context.shared.setdefault("randlora", {"sides": torch.zeros(2, dtype=torch.int64)})
    shared["sides"] = torch.maximum(shared["sides"], torch.tensor(sides))
    if not found:
        return
    shorter, longer = sorted(shared["sides"].tolist())
    whole = [found["A"], found["B"]]
    rank = whole[0].shape[0]
    if [one.ndim for one in whole] != [3, 3] or not rank or whole[0].shape[-1] < shorter or whole[1].shape[0] < longer:
        told = f"the bases {[tuple(one.shape) for one in whole]} are smaller than a layer of {longer} x {shorter}"
        raise ShapeMismatchError(told, context.where, "randlora_A")
    own = {"A": whole[0][..., :shorter], "B": whole[1][:longer, : -(-shorter // rank)]}
    for name, tensor in own.items():
        before = shared.get(name, tensor)
        if not torch.equal(tensor[tuple(slice(size) for size in before.shape)], before):
            raise CheckpointError("has modules with other bases than others, and they share them", context.where)
        shared[name] = tensor.contiguous()
