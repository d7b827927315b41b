"""LoCon's tensors in Tucker form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import ShapeMismatchError
from adapterkit_lycoris.codecs.updates import ALPHA, DORA, described, only, require_whole, update

_DOWN, _MID, _UP = "lora_down.weight", "lora_mid.weight", "lora_up.weight"


class TuckerCodec(Codec):
    """`alpha / rank * up . mid . down`: down [rank, in, 1, ...], mid [rank, rank, *kernel], up [out, rank, 1, ...]."""

    names = frozenset({_DOWN, _MID, _UP, ALPHA, DORA})
    types = frozenset({"tucker"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names if names >= {_DOWN, _MID, _UP} else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (tensors[_UP].shape[0], tensors[_DOWN].shape[1], *tensors[_MID].shape[2:])

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True  # it has parts by rows, but a file holds it for a layer as a whole

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        down, mid, up = (tensors[name] for name in (_DOWN, _MID, _UP))
        rank = down.shape[0]
        if self.shape(tensors) != place.shape or up.shape[1] != rank or mid.shape[:2] != (rank, rank):
            told = (
                f"down {tuple(down.shape)}, mid {tuple(mid.shape)} and up {tuple(up.shape)} are not for {place.shape}"
            )
            raise ShapeMismatchError(told, context.where, place.point.path)
        if place.columns is not None:
            require_whole(place, "Tucker", context)
        parts = {"lora_down": down.flatten(1), "lora_mid": mid, "lora_up": place.of_rows(up.flatten(1)).contiguous()}
        return update("tucker", rank, {}, parts, tensors)

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = only(said, context)
        own, beside = described(place, one)
        ones = (1,) * (len(place.shape) - 2)
        down, up = (own[name].view(*own[name].shape, *ones) for name in ("lora_down", "lora_up"))
        return {_DOWN: down, _MID: own["lora_mid"], _UP: up, **beside}
