"""LoKr as PEFT writes it: its config tells which of its factors are products, from rank and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
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
        own = {name: kernel_core(t, place) if name == "lokr_t2" else t for name, t in tensors.items()}
        rank, said_alpha = context.config.get("r"), context.config.get("alpha")
        if rank and said_alpha is not None:  # without them the scale is 1
            alpha = torch.tensor(float(said_alpha), dtype=torch.float64)
            if not any(name.endswith("_a") for name in own):
                own["lokr_w1"] = own["lokr_w1"] * (alpha / rank).to(own["lokr_w1"].dtype)
            own["alpha"] = alpha
        dropout = context.config.get("module_dropout")
        said = Plain().read(own, place, context)
        if not isinstance(said, Said) or said.type != "lokr":
            return said
        if len(place.shape) == 3 and "lokr_w2" in said.tensors:
            return _mixed_up(said, place, context)
        more = {"module_dropout": dropout} if dropout and not place.point.is_read else {}
        return Said("lokr", {**said.config, "factor": context.config.get("decompose_factor", -1), **more}, said.tensors)

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = whole(said, "LoKr", context)
        own, rank = dict(one.tensors), one.config["rank"]
        if len(place.shape) == 3 and "lokr_w2" in own:
            told = "PEFT mixes up the axes of a whole w2 of Conv1d; native and lycoris hold it"
            raise CheckpointError(told, context.where, place.point.path)
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
        context.config["decompose_factor"] = _factors(first, second, place, one, context)
        if rank < max(first) / 2:
            context.config["decompose_both"] = "lokr_w1_a" in own
        if kernel_of(place.point) and "lokr_w2" not in own:
            context.config["use_effective_conv2d"] = tucker
        short = tucker and len(place.shape) == 3
        return {name: t[..., None] if short and name == "lokr_t2" else t for name, t in own.items()}


def _mixed_up(said: Said, place: Place, context: Context) -> Said:
    """A whole w2 of a Conv1d as PEFT computes it: its product takes the rows of w2 for axes of their own."""
    whole = wide(said.tensors["lokr_w2"])
    first = said.tensors.get("lokr_w1")
    first = wide(said.tensors["lokr_w1_a"]) @ wide(said.tensors["lokr_w1_b"]) if first is None else wide(first)
    alpha = said.config.get("alpha")
    scale = 1.0 if alpha is None else alpha / said.config["rank"]
    context.note("LoKr of Conv1d, whose axes PEFT mixes up, is kept as differences of weights")
    return Said("full_diff", {"part": "weight"}, {"diff": torch.kron(first, whole).reshape(place.shape) * scale})


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


def _factors(
    first: tuple[int, int], second: tuple[int, int], place: Place, said: Said, context: Context
) -> frozenset[tuple[tuple[str, int]]]:
    """What makes PEFT choose these sizes."""
    wanted = [*zip(first, second, strict=True)]
    factors = {said.config.get("factor", -1), -1, *first, *second}
    fit = {factor for factor in factors if [_chosen(size, factor) for size in place.shape[:2]] == wanted}
    if not fit:
        told = f"PEFT would not choose a first factor of {first} here; native and lycoris hold it"
        raise CheckpointError(told, context.where, place.point.path)
    return frozenset((("decompose_factor", factor),) for factor in fit)


def _chosen(size: int, factor: int) -> tuple[int, int]:
    """PEFT's two factors of a size: one that divides it is the first, whatever the other."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    return factored(size, factor if factor <= math.isqrt(size) else -1)
