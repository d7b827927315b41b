"""Prompts as PEFT writes them: one tensor for the whole model, whatever made it in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit.formats.codecs.peft_embedded import embedded, is_embedded, is_pooled, unembedded
from adapterkit.formats.low_rank import module_of
from adapterkit.points import TokensPoint

_NAME = "prompt_embeddings"
_PROMPTS = ("PROMPT_TUNING", "P_TUNING")


class PromptCodec(Codec):
    """Positions [length, features] in front of the sequence; of an encoder-decoder's two halves the first is read."""

    names = frozenset({_NAME})
    types = frozenset({"prompt"})
    whole = True

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names if self.names <= names and context.config.get("peft_type") in _PROMPTS else frozenset()

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said | Sequence[Said]:
        if not isinstance(place.point, TokensPoint) or place.point.role != "prompt":
            return []
        prompt = tensors[_NAME]
        parts = 2 if context.config.get("num_transformer_submodules") == 2 else 1
        length, features = prompt.shape[0] // parts, place.point.out_features
        if prompt.ndim != 2 or prompt.shape[1] != features or length < 1 or prompt.shape[0] % parts:
            told = f"is {tuple(prompt.shape)}, for {features} features and {parts} parts of the model"
            raise ShapeMismatchError(told, context.where, _NAME)
        prompt, config = prompt[:length].contiguous(), {"length": length, "padded": True}
        if is_embedded(place):
            prompt = embedded(prompt, place, context)
            config["pooled"] = is_pooled(place)
        return Said("prompt", config, {"prompt": prompt})

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = said[0]
        decoder = place.point.tags.get("stack") is None
        if len(said) > 1 or place.point.role != "prompt" or (decoder and not one.config.get("padded")):
            told = "PEFT's prompts stand at the first places of the sequence (padded=True) of a whole model"
            raise CheckpointError(f"{told}; native holds this one", context.where, place.point.id)
        prompt = _made(one, place, context)
        if is_embedded(place):
            prompt = unembedded(prompt, place, context)
            if bool(one.config.get("pooled")) != is_pooled(place):
                told = f"PEFT's classifiers pool the prompt's first position (pooled={is_pooled(place)})"
                raise CheckpointError(f"{told}; native holds this one", context.where, place.point.id)
        parts = 1 if decoder else 2
        fields: dict[str, Any] = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(prompt)}
        context.config |= {**fields, "token_dim": prompt.shape[1], "num_transformer_submodules": parts}
        return {_NAME: torch.cat([prompt] * parts)}


def _made(said: Said, place: Place, context: Context) -> Tensor:
    """The positions; of a prompt that a network makes, what it makes."""
    if "prompt" in said.tensors:
        return said.tensors["prompt"]
    module: Any = module_of(said, place.point, context.where, context.made)
    with torch.no_grad():
        return module.lengthen(module.embedding[None])
