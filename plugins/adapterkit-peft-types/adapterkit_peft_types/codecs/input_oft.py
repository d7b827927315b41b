"""OFT in files of PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit_peft_types.codecs.modules import field
from adapterkit_peft_types.codecs.whole import WholeCodec
from adapterkit_peft_types.input_oft import InputOFT

_R, _EMBEDDING_R = "oft_R.weight", "oft_embedding_R.weight"
_EPS, _TERMS = 6e-5, 5


class InputOFTCodec(WholeCodec):
    """`oft_R.weight` [blocks, block * (block - 1) / 2]; what a block is follows, the rest is in the config."""

    names = frozenset({_R, _EMBEDDING_R})
    required = frozenset[str]()  # either of them
    types = frozenset({"input_oft"})
    peft_type = "OFT"
    forms = frozenset({"linear", "linear_t", "conv", "embedding"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        weight = next(iter(tensors.values()))
        block = (1 + math.isqrt(1 + 8 * weight.shape[-1])) // 2
        shared = field(context, "block_share", False)
        width = place.shape[0] if place.point.form == "embedding" else math.prod(place.shape[1:])
        blocks = 1 if shared else width // block
        if weight.shape != (blocks, block * (block - 1) // 2) or width % block:
            told = f"is {tuple(weight.shape)}, for {width} features in blocks of {block}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        config: dict[str, Any] = {"block": block, "shared_blocks": shared}
        series = field(context, "use_cayley_neumann", False)
        config["terms"] = field(context, "num_cayley_neumann_terms", _TERMS) if series else None
        config["constraint"] = field(context, "eps", _EPS) if field(context, "coft", False) else None
        if len(place.shape) > 2 and any(size > 1 for size in place.shape[2:]):
            config["patches"] = True
            context.note("OFT of convolutions is read as PEFT computes it, by patches; what PEFT merges is another")
        return self.at(place, Said("input_oft", config, {"weight": weight}), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        config = InputOFT.from_dict(said.config)
        if len(place.shape) not in (2, 4):
            told = "PEFT's OFT acts on linear layers, 2d convolutions and embeddings; native holds any"
            raise CheckpointError(told, context.where, place.point.id)
        constraint = {} if config.constraint is None else {"coft": True, "eps": config.constraint}
        series = {} if config.terms is None else {"num_cayley_neumann_terms": config.terms}
        width = place.shape[0] if place.point.form == "embedding" else math.prod(place.shape[1:])
        choices = [
            (("oft_block_size", config.block), ("r", 0)),
            (("oft_block_size", 0), ("r", width // config.block)),
        ]
        found: dict[str, Any] = {"oft_block_size": frozenset(choices), "block_share": config.shared_blocks}
        if place.point.form == "linear_t":
            found["fan_in_fan_out"] = True
        return {**found, "use_cayley_neumann": config.terms is not None, **series, **constraint}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {_EMBEDDING_R if place.point.form == "embedding" else _R: said.tensors["weight"]}
