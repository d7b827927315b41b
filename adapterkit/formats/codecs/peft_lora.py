"""LoRA as PEFT writes it: `lora_A`, `lora_B`, and rank and alpha in the config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

from torch import Tensor

from adapterkit.codec import Codec, Context, Place, Said
from adapterkit.errors import ShapeMismatchError

_A, _B = "lora_A.weight", "lora_B.weight"


class LoRACodec(Codec):
    """`scale B A`: A [rank, in, *kernel], B [out, rank, 1, ...]."""

    names = frozenset({_A, _B})
    types = frozenset({"lora"})
    writes_factors = True

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names if {_A, _B} <= names else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (tensors[_B].shape[0], *tensors[_A].shape[1:])

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        a, b = tensors[_A], tensors[_B]
        rank = a.shape[0]
        if b.ndim < 2 or b.shape[:2] != (place.shape[0], rank) or b[0, 0].numel() != 1 or rank < 1:
            told = f"B is {tuple(b.shape)} and A {tuple(a.shape)}, for a weight of {place.shape}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        alpha = context.config.get("lora_alpha", rank)
        alpha = alpha * math.sqrt(rank) if context.config.get("use_rslora") else alpha
        tensors = {"A": place.of_columns(a).contiguous(), "B": place.of_rows(b.flatten(1)).contiguous()}
        return Said("lora", {"rank": rank, "alpha": float(alpha)}, tensors)
