"""MiSS in files of PEFT, and Bone, as it was called before."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError
from adapterkit_peft_types.codecs.modules import check_shapes, dropout
from adapterkit_peft_types.codecs.whole import WholeCodec
from adapterkit_peft_types.miss import MiSS

_START = {"shared": True, "mini": "mini", "bat": "bat"}


class MiSSCodec(WholeCodec):
    """`miss_block`: [r, out], of the form "mini" [r, m], of the form "bat" [out / r, r, r]."""

    names = frozenset({"miss_block", "bone_block"})
    types = frozenset({"miss"})
    peft_type = "MISS"

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names if len(self.names & names) == 1 else frozenset()

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        [(name, block)] = tensors.items()
        (out, width), rank = place.shape[:2], block.shape[-2]
        form = "bat" if block.ndim == 3 else "mini" if context.config.get("init_weights") == "mini" else "shared"
        mini = block.shape[-1] if form == "mini" else 1
        shape = {"bat": (out // max(rank, 1), rank, rank), "mini": (rank, mini), "shared": (rank, out)}[form]
        check_shapes(place, context, **{name: (block, shape)})
        if rank > width:
            raise CheckpointError(f"has a rank of {rank}, and {width} inputs", context.where, place.point.path)
        config = {"rank": rank, "form": form, "mini": mini, **dropout(context, "miss_dropout")}
        return self.at(place, Said("miss", config, {"block": block}), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        config = MiSS.from_dict(said.config)
        return {
            "r": config.rank,
            "init_weights": _START[config.form],
            "mini_r": config.mini,
            "miss_dropout": config.dropout,
        }

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {"miss_block": said.tensors["block"]}
