"""CPT in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, InvalidHeaderError, ShapeMismatchError
from adapterkit.points import TokensPoint
from adapterkit_peft_types.codecs.modules import field
from adapterkit_peft_types.cpt import CPT

_NAME = "prompt_embeddings"


class CPTCodec(Codec):
    """The prompt's vectors as they are now, [length, features]; what they are is in the config."""

    names = frozenset({_NAME})
    types = frozenset({"cpt"})
    axes: ClassVar[Mapping[str, int]] = {_NAME: 2}
    whole = True

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names if context.config.get("peft_type") == "CPT" else frozenset()

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Sequence[Said]:
        if not isinstance(place.point, TokensPoint) or place.point.role != "prompt" or not place.point.lengthens:
            return ()
        start = tensors[_NAME]
        kinds = tuple(_numbers(context, "cpt_tokens_type_mask"))
        if tuple(start.shape) != (len(kinds), place.point.out_features):
            told = f"{_NAME} is {tuple(start.shape)}, and {(len(kinds), place.point.out_features)} is expected"
            raise ShapeMismatchError(told, context.where, place.point.id)
        config = CPT(
            tokens=tuple(_numbers(context, "cpt_token_ids")),
            kinds_of_tokens=kinds,
            radius=float(field(context, "opt_projection_epsilon", 0.1)),
            template_radius=float(field(context, "opt_projection_format_epsilon", 0.1)),
        )
        moving = sum(config.radius_of(kind) is not None for kind in kinds)
        values = {name: value for name, value in config.to_dict().items() if name != "targets"} | {"padded": True}
        return [Said("cpt", values, {"start": start, "move": torch.zeros(moving, start.shape[1], dtype=start.dtype)})]

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        ((place, one),) = said
        own = CPT.from_dict(one.config)
        if not one.config.get("padded"):
            context.note("PEFT puts a prompt in front of padding: padded rows get other outputs there")
        if len(own.tokens) != len(own.kinds_of_tokens):
            told = "PEFT has a token for every position of the prompt, and these started elsewhere"
            raise CheckpointError(f"{told}; native holds any", context.where, place.point.id)
        module = own.build(place.point)
        module.load_state_dict(dict(one.tensors), assign=True)
        length, width = one.tensors["start"].shape
        context.config |= {
            "peft_type": "CPT",
            "task_type": "CAUSAL_LM",
            "cpt_token_ids": list(own.tokens),
            "cpt_mask": [1] * length,
            "cpt_tokens_type_mask": list(own.kinds_of_tokens),
            "opt_projection_epsilon": own.radius,
            "opt_projection_format_epsilon": own.template_radius,
            "num_virtual_tokens": length,
            "token_dim": width,
            "num_transformer_submodules": 1,
        }
        return {_NAME: module.lengthen(one.tensors["start"]).detach()}


def _numbers(context: Context, name: str) -> list[int]:
    value: Any = field(context, name, None)
    if isinstance(value, list) and all(type(one) is int for one in value):
        return value
    raise InvalidHeaderError(f"must be a list of whole numbers, not {str(value)[:80]}", context.where, name)
