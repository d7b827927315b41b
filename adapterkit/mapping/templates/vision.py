"""Attentions, feed-forwards and blocks of vision models: windows, pools, convolutions, scales and stochastic depth."""

from __future__ import annotations

from typing import Any

from adapterkit.mapping.entries import Fused, Weight
from adapterkit.mapping.layouts import is_class
from adapterkit.mapping.templates.template import AttentionTemplate, Template
from adapterkit.points import Span

_QKV = ("*.q", "*.k", "*.v")


def _by_heads(attention: Any, rows: int) -> list[Span]:
    """Rows [heads, queries + keys + values]: of one width, or keys and queries of `key_dim`."""
    step = rows // attention.num_heads
    narrow = getattr(attention, "key_dim", step // 3)
    sizes = (narrow, narrow, step - 2 * narrow)
    return [Span(sum(sizes[:i]), size, attention.num_heads, step) for i, size in enumerate(sizes)]


def _pairs_by_heads(attention: Any, rows: int) -> list[Span]:
    """Rows [heads, keys + values], where queries are made elsewhere."""
    step, narrow = rows // attention.num_heads, attention.key_dim
    return [Span(start, size, attention.num_heads, step) for start, size in ((0, narrow), (narrow, step - narrow))]


def _unequal(attention: Any, rows: int) -> list[Span]:
    """Queries and keys, then values of another width."""
    narrow = attention.dim_out_qk
    sizes = (narrow, narrow, rows - 2 * narrow)
    return [Span(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _has(*names: str) -> Any:
    return lambda attention: all(isinstance(getattr(attention, name, None), int) for name in names)


_OTHER_LOGITS = frozenset({"crpe", "cpb_mlp", "meta_mlp"})
"""Children of attentions with a softmax of keys alone, or of cosines."""


def _is_no_softmax_of_products(attention: Any) -> bool:
    if not _OTHER_LOGITS.isdisjoint(attention._modules) or isinstance(getattr(attention, "ws", None), int):
        return True  # `ws`: Twins cuts tokens into windows in front of the heads
    return "temperature" in attention._parameters or is_class(attention, "timm", "ChannelAttention")


_PROJ = Weight("*.o", "proj.ln.linear|proj.linear|proj|o_proj")

_POOLING = (Weight("*.q", "q.ln.linear"), Fused(("*.k", "*.v"), "kv.linear", _pairs_by_heads), _PROJ)


def _is_transposed(attention: Any) -> bool:
    """LeViT's of convolutions, whose values are mixed from the left."""
    return getattr(attention, "use_conv", False) is True


VISION_ATTENTIONS: tuple[AttentionTemplate, ...] = (
    # Queries from elsewhere: GCViT's are the same for all windows.
    AttentionTemplate(
        "qkv proj", (Fused(("*.k", "*.v"), "qkv"), _PROJ), when=lambda one: getattr(one, "use_global", False) is True
    ),
    AttentionTemplate("qkv.linear", (Fused(_QKV, "qkv.linear", _by_heads), _PROJ), linear=True, when=_is_transposed),
    AttentionTemplate("qkv.linear", (Fused(_QKV, "qkv.linear", _by_heads), _PROJ), when=_has("key_dim")),
    AttentionTemplate("qkv", (Fused(_QKV, "qkv", _by_heads), _PROJ), when=_has("key_dim")),
    AttentionTemplate("qkv", (Fused(_QKV, "qkv", _unequal),), when=_has("dim_out_qk", "dim_out_v")),
    AttentionTemplate(
        "qkv", (Fused(_QKV, "qkv", _by_heads), _PROJ), when=lambda one: getattr(one, "head_first", False) is True
    ),
    # Softmax whose logits or weights are mixed between heads, over channels, or over keys alone.
    AttentionTemplate("qkv proj proj_l", (Fused(_QKV, "qkv"), _PROJ), linear=True),
    AttentionTemplate("qkv proj", (Fused(_QKV, "qkv"), _PROJ), linear=True, when=_is_no_softmax_of_products),
    AttentionTemplate("qkv proj", (Fused(_QKV, "qkv"), _PROJ)),
    AttentionTemplate("pwise", (Fused(_QKV, "pwise", _by_heads), _PROJ), when=_has("head_dim", "num_keys")),
    AttentionTemplate("q kv proj", (Weight("*.q", "q"), Fused(("*.k", "*.v"), "kv"), _PROJ)),
    AttentionTemplate("q.ln.linear kv.linear", _POOLING, linear=True, when=_is_transposed),
    AttentionTemplate("q.ln.linear kv.linear", _POOLING, when=_has("key_dim")),
    AttentionTemplate("qk v proj", (Fused(("*.q", "*.k"), "qk"), Weight("*.v", "v"), _PROJ)),
    AttentionTemplate("v attn proj", (Weight("*.v", "v"), _PROJ)),  # VOLO makes its weights of one token by a layer
    AttentionTemplate(
        "q_proj.linear k_proj.linear v_proj.linear",
        (*(Weight(role, f"{role[2]}_proj.linear") for role in _QKV), Weight("*.o", "o_proj.linear")),
    ),
    AttentionTemplate(
        "q.conv k.conv v.conv talking_head1",
        (*(Weight(role, f"{role[2]}.conv") for role in _QKV), Weight("*.o", "proj.conv")),
        linear=True,
    ),
    AttentionTemplate(
        "q.conv k.conv v.conv", (*(Weight(role, f"{role[2]}.conv") for role in _QKV), Weight("*.o", "proj.conv"))
    ),
    AttentionTemplate(
        "query.proj key.proj value.proj",
        (
            *(Weight(role, f"{name}.proj") for role, name in zip(_QKV, ("query", "key", "value"), strict=True)),
            Weight("*.o", "output.proj"),
        ),
        heads=lambda one: (1, one.key.proj.out_channels, one.value.proj.out_channels),
    ),
    AttentionTemplate(
        "to_query to_key proj final",
        (Weight("*.q", "to_query"), Weight("*.k", "to_key"), Weight("*.o", "final")),
        linear=True,
    ),
)
"""The first that matches is a module's."""


def _gate_first(forward: Any) -> bool:
    return _is_packed(forward) and not forward.gate_last


def _gate_last(forward: Any) -> bool:
    return _is_packed(forward) and forward.gate_last


def _is_packed(forward: Any) -> bool:
    return isinstance(getattr(forward, "gate_last", None), bool)


VISION_FEED_FORWARDS: tuple[Template, ...] = (
    Template("fc1 fc2", (Fused(("*.gate", "*.up"), "fc1"), Weight("*.down", "fc2")), when=_gate_first),
    Template("fc1 fc2", (Fused(("*.up", "*.gate"), "fc1"), Weight("*.down", "fc2")), when=_gate_last),
    Template("fc1_g fc1_x fc2", (Weight("*.gate", "fc1_g"), Weight("*.up", "fc1_x"), Weight("*.down", "fc2"))),
    Template("w0 w1 w2", (Weight("*.gate", "w0"), Weight("*.up", "w1"), Weight("*.down", "w2"))),
    Template(
        "gate_proj.linear up_proj.linear down_proj.linear",
        tuple(Weight(f"*.{name}", f"{name}_proj.linear") for name in ("gate", "up", "down")),
    ),
    Template("ln1.linear ln2.linear", (Weight("*.up", "ln1.linear"), Weight("*.down", "ln2.linear"))),
    Template("fc1.conv fc2.conv", (Weight("*.up", "fc1.conv"), Weight("*.down", "fc2.conv"))),
)
"""The first that matches is a module's."""
