"""Prefixes as PEFT writes them: keys and values of all layers in one tensor, as the model's cache would hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from adapterkit.codec import Codec, Context, Place, Said
from adapterkit.errors import ShapeMismatchError
from adapterkit.points import AttentionPoint

_NAME = "prompt_embeddings"


class PrefixCodec(Codec):
    """[length, layers * 2 * heads * head_dim]: layer by layer the keys, then the values."""

    names = frozenset({_NAME})
    types = frozenset({"prefix"})
    whole = True

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names if self.names <= names and context.config.get("peft_type") == "PREFIX_TUNING" else frozenset()

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said | Sequence[Said]:
        point = place.point
        if not isinstance(point, AttentionPoint) or point.role != "attn.kv":
            return []
        whole, layout = tensors[_NAME], point.layout
        layers = context.config.get("num_layers") or 0
        width = layout.kv_heads * layout.head_dim
        if whole.ndim != 2 or whole.shape[1] != 2 * layers * width:
            told = f"is {tuple(whole.shape)}, for {layers} layers with keys of {width}"
            raise ShapeMismatchError(told, context.where, _NAME)
        length = len(whole)
        layer = int(point.tags["layer"])
        pair = whole.view(length, layers, 2, layout.kv_heads, layout.head_dim)[:, layer].permute(1, 2, 0, 3)
        return Said(
            "prefix",
            {"length": length, "counted": True, "padded": True},
            {"keys": pair[0].contiguous(), "values": pair[1].contiguous()},
        )
