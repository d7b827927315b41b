"""LoKr's tensors, in all of their forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import MissingKeysError
from adapterkit_lycoris.codecs.updates import (
    ALPHA,
    DORA,
    described,
    only,
    require_shape,
    require_whole,
    update,
)

_FIRST, _SECOND = ("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


class LoKrCodec(Codec):
    """`kron(w1, w2) * alpha / rank`, each of them whole or a product; the scale is 1 where both are whole."""

    names = frozenset({*_FIRST, *_SECOND, ALPHA, DORA})
    types = frozenset({"lokr"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names if any(name in names for name in (*_FIRST, *_SECOND)) else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        first, second = _side(tensors, "1"), _side(tensors, "2")
        if first is None or second is None:
            return None
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said | Sequence[Said]:
        first, second = _side(tensors, "1"), _side(tensors, "2")
        if first is None or second is None:
            which = "w1" if first is None else "w2"
            raise MissingKeysError(f"LoKr lacks its {which}, whole or as a product", context.where, place.point.path)
        second = _with_kernel(second, tensors, first, place)
        require_shape((first[0] * second[0], first[1] * second[1], *second[2:]), place, context)
        products = "lokr_w1_a" in tensors, "lokr_w2_a" in tensors
        rank = _rank(tensors)
        if not any(products):
            tensors = {name: tensor for name, tensor in tensors.items() if name != ALPHA}  # the scale is 1, whatever
        parts = {name: t for name, t in tensors.items() if name not in (ALPHA, DORA)}
        if "lokr_w2" in parts:
            parts["lokr_w2"] = parts["lokr_w2"].reshape(second)
        config = {"first": list(first), "low_rank": list(products), "tucker": "lokr_t2" in tensors}
        if place.whole:
            return update("lokr", rank, config, parts, tensors)
        return _part(update("lokr", rank, config, parts, tensors), place, second, context)

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = only(said, context)
        own, beside = described(place, one)
        if not any(name.endswith("_a") for name in own):  # readers take the scale for 1
            rank, alpha = one.config["rank"], one.config.get("alpha")
            scale = 1.0 if alpha is None else alpha / rank
            own["lokr_w1"] = own["lokr_w1"] if scale == 1.0 else own["lokr_w1"] * scale
            beside[ALPHA] = torch.tensor(1.0)
        return {**own, **beside}


def _side(tensors: Mapping[str, Tensor], i: str) -> tuple[int, ...] | None:
    """The shape of w1 or w2; of a product for a convolution, with the kernel in its columns."""
    whole, a, b = (tensors.get(f"lokr_w{i}{end}") for end in ("", "_a", "_b"))
    if whole is not None:
        return tuple(whole.shape)
    if a is None or b is None:
        return None
    core = tensors.get(f"lokr_t{i}")
    return (a.shape[0], b.shape[1]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])


def _with_kernel(
    second: tuple[int, ...], tensors: Mapping[str, Tensor], first: tuple[int, ...], place: Place
) -> tuple[int, ...]:
    kernel = place.shape[2:]
    if len(second) == len(place.shape):
        return second
    if "lokr_w2" in tensors or not kernel:
        return (*second[:2], *kernel) if torch.Size(kernel).numel() == 1 else second
    return (second[0], place.shape[1] // first[1], *kernel)


def _rank(tensors: Mapping[str, Tensor]) -> int:
    for name in ("lokr_w1_b", "lokr_w2_b"):
        if name in tensors:
            return tensors[name].shape[0]
    return 1


def _part(said: Said, place: Place, second: tuple[int, ...], context: Context) -> Said:
    """A part of the rows: of whole blocks of w2 it is a LoKr again, and else a difference."""
    if "magnitude" in said.tensors or place.columns is not None:
        require_whole(place, "LoKr of this kind", context)
    rows = place.rows
    if isinstance(rows, slice) and rows.start % second[0] == 0 and rows.stop % second[0] == 0:
        own = dict(said.tensors)
        name = "lokr_w1" if "lokr_w1" in own else "lokr_w1_a"
        own[name] = own[name][rows.start // second[0] : rows.stop // second[0]].contiguous()
        first = [(rows.stop - rows.start) // second[0], said.config["first"][1]]
        return Said("lokr", {**said.config, "first": first}, own)
    context.note("LoKr at rows that end inside of its blocks is kept as plain differences of weights")
    return Said("full_diff", {"part": "weight"}, {"diff": place.of_rows(_dense(said, place)).contiguous()})


def _dense(said: Said, place: Place) -> Tensor:
    t, scale = said.tensors, said.config["alpha"]
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = torch.einsum("pq...,pk,qn->kn...", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    w2 = w2.reshape(w2.shape[0], place.shape[1] // w1.shape[1], -1)
    blocks = torch.einsum("lm,knx->lkmnx", w1, w2).reshape(place.shape)
    return blocks if scale is None else blocks * (scale / said.config["rank"])
