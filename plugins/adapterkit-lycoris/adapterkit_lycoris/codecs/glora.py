"""GLoRA's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import ShapeMismatchError
from adapterkit_lycoris.codecs.updates import ALPHA, only, require_whole

_ALL = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
_MID = "bm.weight"


class GLoRACodec(Codec):
    """`alpha / rank (W a1 a2 + b1 b2)`; with `bm`, b2 and bm are one factor with a kernel."""

    names = frozenset({*_ALL, _MID, ALPHA})
    types = frozenset({"lycoris_glora"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names if names >= set(_ALL) else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        kernel = tensors[_MID if _MID in tensors else _ALL[3]].shape[2:]
        return (tensors[_ALL[2]].shape[0], tensors[_ALL[1]].shape[1], *kernel)

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True  # it has parts by rows, but a file holds it for a layer as a whole

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        a1, a2, b1, b2 = (tensors[name] for name in _ALL)
        if place.columns is not None:
            require_whole(place, "GLoRA", context)
        rank = a2.shape[0]
        if self.shape(tensors) != place.shape or a1.flatten(1).shape != (place.shape[1], rank) or rank < 1:
            told = f"a1 {tuple(a1.shape)}, b1 {tuple(b1.shape)} and b2 {tuple(b2.shape)} are not for {place.shape}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        if _MID in tensors:
            b2 = torch.einsum("pq...,qi->pi...", tensors[_MID], b2.flatten(1))
        own = {"a1": a1.flatten(1), "a2": a2.flatten(1), "b1": place.of_rows(b1.flatten(1)).contiguous(), "b2": b2}
        alpha = float(tensors[ALPHA]) if ALPHA in tensors else None
        return Said("lycoris_glora", {"rank": rank, "alpha": alpha}, own)

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = only(said, context)
        rank, alpha = one.config["rank"], one.config.get("alpha")
        ones = (1,) * (len(place.shape) - 2)
        thin = {f"{name}.weight": one.tensors[name] for name in ("a1", "a2", "b1")}
        thin = {name: tensor.view(*tensor.shape, *ones) for name, tensor in thin.items()}
        return {**thin, _ALL[3]: one.tensors["b2"], ALPHA: torch.tensor(float(rank if alpha is None else alpha))}
