"""AdaLoRA as PEFT writes it: factors and singular values, of which those that were pruned are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError

_A, _B, _E = "lora_A", "lora_B", "lora_E"
_MORE = 1e-5
"""What PEFT adds to the rank that alpha is divided by."""


class AdaLoRACodec(Codec):
    """`alpha / (init_r + 1e-5) B diag(E) A`: A [rank, in * kernel], B [out, rank], E [rank, 1]."""

    names = frozenset({_A, _B, _E})
    types = frozenset({"adalora"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names if self.names <= names else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (tensors[_B].shape[0], *tensors[_A].shape[1:])

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True  # a rank is pruned for a layer as a whole

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said | Sequence[Said]:
        a, b, e = (tensors[name] for name in (_A, _B, _E))
        rank, first = a.shape[0], context.config.get("init_r") or a.shape[0]
        width = torch.Size(place.shape[1:]).numel()
        if a.shape != (rank, width) or b.shape != (place.shape[0], rank) or e.shape != (rank, 1) or rank > first:
            told = f"A is {tuple(a.shape)}, B {tuple(b.shape)} and E {tuple(e.shape)}, for a weight of {place.shape}"
            raise ShapeMismatchError(f"{told} and a rank of at most {first}", context.where, place.point.path)
        if not rank:
            return []
        alpha = context.config.get("lora_alpha") or 0
        scale = (alpha if alpha > 0 else first) / (first + _MORE)
        config = {"rank": min(rank, context.config.get("target_r") or rank), "initial": rank, "alpha": scale * rank}
        state = {"importance": torch.zeros(rank), "uncertainty": torch.zeros(rank), "kept": torch.ones(rank).bool()}
        q = place.of_columns(a.reshape(rank, *place.shape[1:])).contiguous()
        own = {"P": place.of_rows(b).contiguous(), "Q": q, "E": e.flatten()}
        return Said("adalora", config, {**own, **state})

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = said[0]
        if len(said) > 1 or not place.whole:
            told = "AdaLoRA acts on a part of a fused projection, and PEFT's on all of it; native holds it"
            raise CheckpointError(told, context.where, place.point.path)
        p, q, e = (one.tensors[name] for name in ("P", "Q", "E"))
        rank, alpha = len(e), one.config.get("alpha")
        scale = 1.0 if alpha is None else alpha / rank
        fields = {"peft_type": "ADALORA", "init_r": rank, "target_r": one.config["rank"], "total_step": 1}
        context.config |= {**fields, "lora_alpha": scale * (rank + _MORE)}
        if place.point.form == "linear_t":
            context.config["fan_in_fan_out"] = True
        return {_A: q.flatten(1), _B: p, _E: e[:, None]}
