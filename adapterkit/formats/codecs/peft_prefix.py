"""Prefixes as PEFT writes them: keys and values of all layers in one tensor, as the model's cache would hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, MissingKeysError, ShapeMismatchError, UnsupportedFileError, shown
from adapterkit.formats.low_rank import module_of
from adapterkit.points import AttentionPoint, InjectionPoint

_NAME = "prompt_embeddings"
_LEARNT = frozenset({"bert", "gpt2"})
"""Models with a learnt place for each position, which count them from 0."""
_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
"""The latter keeps some of its positions as they are in training; both compute the same."""


class PrefixCodec(Codec):
    """[length, layers * 2 * heads * head_dim]: layer by layer the keys, then the values."""

    names = frozenset({_NAME})
    types = frozenset({"prefix"})
    whole = True

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names if self.names <= names and context.config.get("peft_type") in _TYPES else frozenset()

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said | Sequence[Said]:
        point, whole = place.point, tensors[_NAME]
        if not isinstance(point, AttentionPoint) or point.role != "attn.kv" or point.tags.get("stack") == "encoder":
            return []
        _check_positions(place, context)
        layers, layout = context.config.get("num_layers"), point.layout
        width = layout.kv_heads * layout.head_dim
        if type(layers) is not int or whole.ndim != 2 or whole.shape[1] != 2 * layers * width:
            told = f"is {tuple(whole.shape)}, for {shown(layers)} layers with keys of {width}"
            raise ShapeMismatchError(told, context.where, _NAME)
        key, value = _entries(point, layers, context)
        each = whole.unflatten(1, (2 * layers, layout.kv_heads, layout.head_dim)).permute(1, 2, 0, 3)
        own = {"keys": each[key].contiguous(), "values": each[value].contiguous()}
        return Said("prefix", {"length": len(whole), "counted": True, "padded": True}, own)

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        first, one = said[0]
        length, layout = one.config["length"], first.point.layout
        if any(
            not (own.config.get("counted") and own.config.get("padded")) or own.config.get("gating") for _, own in said
        ):
            told = "PEFT's prefixes count as positions, and padding too (counted and padded), and have no gate"
            raise CheckpointError(f"{told}; native holds this one", context.where, first.point.id)
        parts = 2 if first.point.tags.get("stack") == "decoder" else 1
        layers = max(int(place.point.tags["layer"]) for place, _ in said) + 1
        whole = torch.zeros(2 * layers, layout.kv_heads, length, layout.head_dim)
        context.config |= {"num_transformer_submodules": parts}
        filled: dict[int, Tensor] = {}
        for place, own in said:
            _check_positions(place, context)
            pair = _pair(own, place, context)
            for entry, tensor in zip(_entries(place.point, layers, context), pair, strict=True):
                if not torch.equal(filled.setdefault(entry, tensor), tensor):
                    told = "PEFT gives several layers of an encoder-decoder one prefix, and here they have their own"
                    raise CheckpointError(f"{told}; native holds it", context.where, place.point.id)
                whole[entry] = tensor
        if len(said) != layers or any(own.config["length"] != length for _, own in said):
            told = "PEFT's prefixes are at every layer, all of one length; native holds this one"
            raise CheckpointError(told, context.where, first.point.id)
        fields: dict[str, Any] = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": length, "num_layers": layers}
        context.config |= {**fields, "num_attention_heads": layout.kv_heads}
        context.config |= {"token_dim": layout.kv_heads * layout.head_dim, "prefix_projection": False}
        return {_NAME: whole.permute(2, 0, 1, 3).flatten(1)}


def _entries(point: InjectionPoint, layers: int, context: Context) -> tuple[int, int]:
    """Which of the 2 * layers entries are a layer's keys and values.

    Of an encoder-decoder PEFT deals them out in fours, for cross attentions too, which then get none.
    """
    layer = point.tags.get("layer")
    if not isinstance(layer, int) or layer >= layers:
        raise MissingKeysError(f"has {layers} layers, and the model has layer {layer}", context.where, point.id)
    first = 4 * layer if context.config.get("num_transformer_submodules") == 2 else 2 * layer
    return first % (2 * layers), (first + 1) % (2 * layers)


def _pair(said: Said, place: Place, context: Context) -> tuple[Tensor, Tensor]:
    """The keys and values; of a prefix that a network makes, what it makes."""
    if "keys" in said.tensors:
        return said.tensors["keys"], said.tensors["values"]
    module: Any = module_of(said, place.point, context.where, context.made)
    with torch.no_grad():
        return module.prefix()


def _check_positions(place: Place, context: Context) -> None:
    """Raises where it is not known how the model counts positions, which PEFT's prefixes move."""
    view = None if place.model is None else place.model.components.get(place.point.model)
    if view is None:
        return
    config = view.config
    relative = config.get("relative_attention_num_buckets") or config.get("rope_parameters") or config.get("rope_theta")
    if not relative and config.get("model_type") not in _LEARNT:
        told = f"how {shown(config.get('model_type'))} counts positions behind a prefix is not known here"
        raise UnsupportedFileError(
            f"{told}; prefixes are read for {', '.join(sorted(_LEARNT))}, T5 and models with rotary embeddings",
            context.where,
            "peft_type",
        )
