"""LoKr as PEFT writes it: its config tells which of its factors are products, from rank and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from adapterkit.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError
from adapterkit_lycoris.codecs.lokr import LoKrCodec as Plain
from adapterkit_lycoris.codecs.peft_common import dropouts, kernel_core, whole
from adapterkit_lycoris.dense import kernel_of, wide
from adapterkit_lycoris.lokr import factored

_NAMES = frozenset({*(f"lokr_w{i}{end}" for i in "12" for end in ("", "_a", "_b")), "lokr_t2"})


class LoKrCodec(Codec):
    """`alpha / r kron(w1, w2)`."""

    names = _NAMES
    types = frozenset({"lokr"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        one, other = ({f"lokr_w{i}"} <= names or {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= names for i in "12")
        return self.names & names if one and other else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        return Plain().shape(tensors)

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said | Sequence[Said]:
        rank = context.config.get("r") or 1
        alpha = context.config.get("alpha")
        alpha = torch.tensor(float(rank if alpha is None else alpha), dtype=torch.float64)
        own = {name: kernel_core(t, place) if name == "lokr_t2" else t for name, t in tensors.items()}
        if not any(name.endswith("_a") for name in own):
            own["lokr_w1"] = own["lokr_w1"] * (alpha / rank).to(own["lokr_w1"].dtype)
        dropout = context.config.get("module_dropout")
        said = Plain().read({**own, "alpha": alpha}, place, context)
        if isinstance(said, Said) and dropout and said.type == "lokr" and not place.point.is_read:
            return Said(said.type, {**said.config, "module_dropout": dropout}, said.tensors)
        return said

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = whole(said, "LoKr", context)
        own, rank = dict(one.tensors), one.config["rank"]
        alpha = one.config.get("alpha")
        scale = 1.0 if alpha is None else alpha / rank
        first, second = _sides(own, place)
        tucker = "lokr_t2" in own
        if "lokr_w2" in own or (rank >= max(second) / 2 and not tucker):
            own = _multiplied(own, "2", (*second, *place.shape[2:]))
            rank, ranked = math.ceil(max(second) / 2), "lokr_w1_a" in own and rank == math.ceil(max(second) / 2)
        else:
            ranked = "lokr_w1_a" in own
        if "lokr_w1_a" in own and not (ranked and rank < max(first) / 2):
            own = _multiplied(own, "1", first)
        fields: dict[str, Any] = {"peft_type": "LOKR", "r": rank, "alpha": scale * rank, **dropouts(one)}
        context.config |= {**fields, "rank_pattern": {}, "alpha_pattern": {}}
        context.config["decompose_factor"] = _factor(first, second, place, one, context)
        if rank < max(first) / 2:
            context.config["decompose_both"] = "lokr_w1_a" in own
        if kernel_of(place.point) and "lokr_w2" not in own:
            context.config["use_effective_conv2d"] = tucker
        short = tucker and len(place.shape) == 3
        return {name: t[..., None] if short and name == "lokr_t2" else t for name, t in own.items()}


def _sides(tensors: Mapping[str, Tensor], place: Place) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes of w1 and, kernel aside, of w2."""
    if "lokr_w1" in tensors:
        rows, columns = tensors["lokr_w1"].shape
    else:
        rows, columns = len(tensors["lokr_w1_a"]), tensors["lokr_w1_b"].shape[1]
    return (rows, columns), (place.shape[0] // rows, place.shape[1] // columns)


def _multiplied(tensors: Mapping[str, Tensor], i: str, shape: Sequence[int]) -> dict[str, Tensor]:
    """With one of the factors whole."""
    name, found = f"lokr_w{i}", dict(tensors)
    if name not in found:
        product = wide(found.pop(f"{name}_a")) @ wide(found.pop(f"{name}_b"))
        found[name] = product.reshape(*shape)
    return found


def _factor(first: tuple[int, int], second: tuple[int, int], place: Place, said: Said, context: Context) -> int:
    """What makes PEFT choose these sizes."""
    wanted = [*zip(first, second, strict=True)]
    for factor in (said.config.get("factor", -1), -1, *first, *second):
        if [factored(size, factor) for size in place.shape[:2]] == wanted:
            return factor
    told = f"PEFT would not choose a first factor of {first} here; native and lycoris hold it"
    raise CheckpointError(told, context.where, place.point.path)
