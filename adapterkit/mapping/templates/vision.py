"""Attentions, feed-forwards and blocks of vision models: windows, pools, convolutions, scales and stochastic depth."""

from __future__ import annotations

from typing import Any

from adapterkit.mapping.layouts import is_class
from adapterkit.mapping.templates.attentions import apart, attention
from adapterkit.mapping.templates.feed_forwards import gated, packed, plain
from adapterkit.mapping.templates.rows import by_heads, pairs_by_heads, side_by_side
from adapterkit.mapping.templates.template import AttentionTemplate, Template
from adapterkit.points import Span


def _unequal(attention: Any, rows: int) -> list[Span]:
    """Queries and keys, then values of another width."""
    narrow = attention.dim_out_qk
    return side_by_side(narrow, narrow, rows - 2 * narrow)


def _has(*names: str) -> Any:
    return lambda attention: all(isinstance(getattr(attention, name, None), int) for name in names)


_OTHER_LOGITS = frozenset({"crpe", "cpb_mlp", "meta_mlp"})
"""Children of attentions with a softmax of keys alone, or of cosines."""


def _is_no_softmax_of_products(attention: Any) -> bool:
    if not _OTHER_LOGITS.isdisjoint(attention._modules) or isinstance(getattr(attention, "ws", None), int):
        return True  # `ws`: Twins cuts tokens into windows in front of the heads
    return "temperature" in attention._parameters or is_class(attention, "timm", "ChannelAttention")


_PROJ = "o proj.ln.linear|proj.linear|proj|o_proj"
_POOLING = f"q q.ln.linear, k+v kv.linear, {_PROJ}"


def _is_transposed(attention: Any) -> bool:
    """LeViT's of convolutions, whose values are mixed from the left."""
    return getattr(attention, "use_conv", False) is True


VISION_ATTENTIONS: tuple[AttentionTemplate, ...] = (
    # Queries from elsewhere: GCViT's are the same for all windows.
    attention(f"k+v qkv, {_PROJ}", also="proj", when=lambda one: getattr(one, "use_global", False) is True),
    attention(f"q+k+v qkv.linear, {_PROJ}", by_heads, linear=True, when=_is_transposed),
    attention(f"q+k+v qkv.linear, {_PROJ}", by_heads, when=_has("key_dim")),
    attention(f"q+k+v qkv, {_PROJ}", by_heads, when=_has("key_dim")),
    attention("q+k+v qkv", _unequal, when=_has("dim_out_qk", "dim_out_v")),
    attention(f"q+k+v qkv, {_PROJ}", by_heads, when=lambda one: getattr(one, "head_first", False) is True),
    # Softmax whose logits or weights are mixed between heads, over channels, or over keys alone.
    attention(f"q+k+v qkv, {_PROJ}", also="proj proj_l", linear=True),
    attention(f"q+k+v qkv, {_PROJ}", also="proj", linear=True, when=_is_no_softmax_of_products),
    attention(f"q+k+v qkv, {_PROJ}", also="proj"),
    attention(f"q+k+v pwise, {_PROJ}", by_heads, when=_has("head_dim", "num_keys")),
    attention(f"q q, k+v kv, {_PROJ}", also="proj"),
    attention(_POOLING, pairs_by_heads, linear=True, when=_is_transposed),
    attention(_POOLING, pairs_by_heads, when=_has("key_dim")),
    attention(f"q+k qk, v v, {_PROJ}", also="proj pos_proj", refused="adds a softmax over places to that over keys"),
    attention(f"q+k qk, v v, {_PROJ}", also="proj"),
    attention(f"v v, {_PROJ}", also="attn proj"),  # VOLO makes its weights of one token by a layer
    apart("q_proj.linear", "k_proj.linear", "v_proj.linear", "o_proj.linear"),
    apart("q.conv", "k.conv", "v.conv", "proj.conv", also="talking_head1", linear=True),
    apart("q.conv", "k.conv", "v.conv", "proj.conv"),
    apart(
        "query.proj",
        "key.proj",
        "value.proj",
        "output.proj",
        heads=lambda one: (1, one.key.proj.out_channels, one.value.proj.out_channels),
    ),
    attention("q to_query, k to_key, o final", also="proj final", linear=True),
)
"""The first that matches is a module's."""


def _gate_first(forward: Any) -> bool:
    return _is_packed(forward) and not forward.gate_last


def _gate_last(forward: Any) -> bool:
    return _is_packed(forward) and forward.gate_last


def _is_packed(forward: Any) -> bool:
    return isinstance(getattr(forward, "gate_last", None), bool)


VISION_FEED_FORWARDS: tuple[Template, ...] = (
    packed("fc1", "fc2", "*.gate *.up", when=_gate_first),
    packed("fc1", "fc2", "*.up *.gate", when=_gate_last),
    gated("fc1_g", "fc1_x", "fc2"),
    gated("w0", "w1", "w2"),
    gated("gate_proj.linear", "up_proj.linear", "down_proj.linear"),
    plain("ln1.linear", "ln2.linear"),
    plain("fc1.conv", "fc2.conv"),
)
"""The first that matches is a module's."""
