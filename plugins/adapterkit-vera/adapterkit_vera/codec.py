"""VeRA as PEFT writes it: two vectors for a module, and the projections that all share, or the seed of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, MissingKeysError, ShapeMismatchError

_B, _D = "vera_lambda_b", "vera_lambda_d"
_SHARED = {"A": "vera_A", "B": "vera_B"}


class VeRACodec(Codec):
    """`diag(b) B diag(d) A`: b [out], d [rank]; A [rank, widest input] and B [widest output, rank] for the file."""

    names = frozenset({_B, _D})
    axes = dict.fromkeys(names, 1)
    types = frozenset({"vera"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names if self.names <= names else frozenset()

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        b, d = tensors[_B], tensors[_D]
        rank, saved = len(d), context.config.get("save_projection", True)
        if b.shape != place.shape[:1] or d.ndim != 1 or rank < 1 or rank != context.config.get("r", rank):
            told = f"b is {tuple(b.shape)} and d {tuple(d.shape)}, for {place.shape[0]} outputs"
            raise ShapeMismatchError(f"{told} and a rank of {context.config.get('r')}", context.where, place.point.path)
        if not place.whole:
            told = "VeRA of a part of a fused layer has rows of the projections that are not its first"
            raise CheckpointError(told, context.where, place.point.path)
        _share(rank, bool(saved), place, context)
        fields = {
            "rank": rank,
            "save_projection": bool(saved),
            "projection_seed": context.config.get("projection_prng_key") or 0,
        }
        dropout = context.config.get("vera_dropout")
        own = {"dropout": 0.0 if place.point.is_read else dropout} if dropout else {}
        return Said("vera", {**fields, **own, "d_initial": context.config.get("d_initial") or 0.1}, {"b": b, "d": d})

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = said[0]
        if len(said) > 1 or not place.whole:
            told = "VeRA acts on a part of a fused projection, and PEFT's on all of it; native holds it"
            raise CheckpointError(told, context.where, place.point.path)
        if len(place.shape) > 2:
            raise CheckpointError("PEFT has no VeRA of convolutions; native holds it", context.where, place.point.path)
        saved = one.config.get("save_projection", True)
        context.config |= {
            "peft_type": "VERA",
            "r": len(one.tensors["d"]),
            "save_projection": saved,
            "projection_prng_key": one.config.get("projection_seed", 0),
            "d_initial": one.config.get("d_initial", 0.1),
        }
        if place.point.form == "linear_t":
            context.config["fan_in_fan_out"] = True
        if saved:
            context.tensors |= {name: context.shared["vera"][own] for own, name in _SHARED.items()}
        return {_B: one.tensors["b"], _D: one.tensors["d"]}


def _share(rank: int, saved: bool, place: Place, context: Context) -> None:
    """Makes the shared projections wide enough for a place; those of a file may be wider."""
    shared = context.shared.setdefault("vera", {"widths": torch.zeros(2, dtype=torch.int64)})
    widths = torch.tensor([math.prod(place.shape[1:]), place.shape[0]])
    shared["widths"] = torch.maximum(shared["widths"], widths)
    if not saved:
        return
    for axis, (own, name) in zip((1, 0), _SHARED.items(), strict=True):
        if name not in context.tensors:
            raise MissingKeysError("is not there, and save_projection says that it is", context.where, name)
        whole, width = context.tensors[name], int(shared["widths"][1 - axis])
        if whole.ndim != 2 or whole.shape[1 - axis] != rank or whole.shape[axis] < width:
            told = f"is {tuple(whole.shape)}, for a rank of {rank} and layers of up to {width}"
            raise ShapeMismatchError(told, context.where, name)
        context.used.add(name)
        shared[own] = whole.narrow(axis, 0, width).contiguous()
