"""LoRA as kohya's scripts, LyCORIS and the UIs write it: `lora_down`, `lora_up` and an alpha for each module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import ShapeMismatchError
from adapterkit.formats.low_rank import factors_of, joined

_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


class LoRACodec(Codec):
    """`alpha / rank * up down`: down [rank, in, *kernel], up [out, rank, 1, ...]; without alpha the scale is 1."""

    names = frozenset({_DOWN, _UP, _ALPHA})
    types = frozenset({"lora"})
    writes_factors = True

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        others = {"lora_mid.weight", "dora_scale"}
        return self.names if {_DOWN, _UP} <= names and not others & names else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (tensors[_UP].shape[0], *tensors[_DOWN].shape[1:])

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        down, up = tensors[_DOWN], tensors[_UP]
        rank = down.shape[0]
        if rank < 1 or up.ndim < 2 or up.shape[:2] != (place.shape[0], rank) or up[0, 0].numel() != 1:
            told = f"up is {tuple(up.shape)} and down {tuple(down.shape)}, for a weight of {place.shape}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        down = place.of_columns(_like(down, place.shape))
        config = {"rank": rank, "alpha": float(tensors[_ALPHA]) if _ALPHA in tensors else None}
        return Said("lora", config, {"A": down.contiguous(), "B": place.of_rows(up.flatten(1)).contiguous()})

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        found = [(place, factors_of(one, place.point, context.where, context.made)) for place, one in said]
        down, up, scale = joined([(place, factors) for place, factors in found if factors is not None])
        ones = (1,) * (down.ndim - 2)
        return {_DOWN: down, _UP: up.reshape(*up.shape, *ones), _ALPHA: torch.tensor(scale * len(down))}


def _like(down: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A factor of a 1 x 1 convolution may be a matrix, and the other way round."""
    return down.reshape(down.shape[0], *shape[1:]) if down[0].numel() == torch.Size(shape[1:]).numel() else down
