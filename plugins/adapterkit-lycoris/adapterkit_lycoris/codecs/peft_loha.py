"""LoHa as PEFT writes it: rank and alpha are in the config, and a kernel of one axis has another of size one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import ShapeMismatchError
from adapterkit_lycoris.codecs.peft_common import dropouts, kernel_core, scaled, whole
from adapterkit_lycoris.dense import kernel_of

_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


class LoHaCodec(Codec):
    """`alpha / r (w1_a w1_b) * (w2_a w2_b)`; for convolutions with cores t1 and t2 too."""

    names = frozenset({*_NAMES, *_CORES})
    types = frozenset({"loha"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names if {*_NAMES} <= names else frozenset()

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        a, b, core = tensors[_NAMES[0]], tensors[_NAMES[1]], tensors.get(_CORES[0])
        return (a.shape[0], b.shape[1]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        tucker = _CORES[0] in tensors
        own = {name: kernel_core(t, place) if name in _CORES else t for name, t in tensors.items()}
        rank, out, rest = own["hada_w1_b"].shape[0], place.shape[0], place.shape[1:]
        wanted = {"a": (rank, out) if tucker else (out, rank), "b": (rank, rest[0] if tucker else math.prod(rest))}
        for name in _NAMES:
            if tuple(own[name].shape) != wanted[name[-1]]:
                told = f"{name} is {tuple(own[name].shape)}, for a weight of {place.shape}"
                raise ShapeMismatchError(told, context.where, place.point.path)
        config = scaled(rank, context, place)
        for name in ("hada_w1_a", "hada_w2_a"):
            own[name] = place.of_rows(own[name], axis=1 if tucker else 0).contiguous()
        return Said("loha", {**config, "tucker": tucker}, own)

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = whole(said, "LoHa", context)
        rank, alpha = one.config["rank"], one.config.get("alpha")
        fields: dict[str, Any] = {"peft_type": "LOHA", "r": rank, "alpha": rank if alpha is None else alpha}
        context.config |= {**fields, "rank_pattern": {}, "alpha_pattern": {}, **dropouts(one)}
        tucker = _CORES[0] in one.tensors
        if kernel_of(place.point):
            context.config["use_effective_conv2d"] = tucker
        short = tucker and len(place.shape) == 3
        return {name: t[..., None] if short and name in _CORES else t for name, t in one.tensors.items()}
