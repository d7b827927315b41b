"""Prompts and prefixes as PEFT writes them: one tensor for the whole model, whatever made it in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from adapterkit.codec import Codec, Context, Place, Said
from adapterkit.errors import ShapeMismatchError
from adapterkit.points import TokensPoint

_NAME = "prompt_embeddings"
_PROMPTS = ("PROMPT_TUNING", "P_TUNING")


class PromptCodec(Codec):
    """Positions [length, features] in front of the sequence; of an encoder-decoder's the first half is read."""

    names = frozenset({_NAME})
    types = frozenset({"prompt"})
    whole = True

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names if self.names <= names and context.config.get("peft_type") in _PROMPTS else frozenset()

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said | Sequence[Said]:
        if not isinstance(place.point, TokensPoint) or place.point.role != "prompt":
            return []
        prompt = tensors[_NAME]
        parts = context.config.get("num_transformer_submodules") or 1
        length, features = prompt.shape[0] // parts, place.point.out_features
        if prompt.ndim != 2 or prompt.shape[1] != features or length < 1 or prompt.shape[0] % parts:
            told = f"is {tuple(prompt.shape)}, for {features} features and {parts} parts of the model"
            raise ShapeMismatchError(told, context.where, _NAME)
        return Said("prompt", {"length": length, "padded": True}, {"prompt": prompt[:length].contiguous()})
