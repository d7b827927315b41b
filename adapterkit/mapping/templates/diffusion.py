"""Attentions and feed-forwards of diffusion models: two streams in one softmax, projections that are fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from adapterkit.mapping.entries import Fused, FusedInput, SplitRows, Weight, equal_parts
from adapterkit.mapping.layouts import is_class
from adapterkit.mapping.templates.attentions import apart, attention, layers
from adapterkit.mapping.templates.feed_forwards import gated, packed, plain
from adapterkit.mapping.templates.rows import QKV, side_by_side
from adapterkit.mapping.templates.template import AttentionTemplate, Template
from adapterkit.points import Span

_OUT = "to_out.0|to_out"


def _heads(attention: Any) -> tuple[int, int, int]:
    """`heads` counts those of queries; keys may have fewer."""
    width = attention.to_q.out_features // attention.heads
    groups = attention.to_k.out_features // width
    return groups, width, attention.to_v.out_features // groups


def _has_heads(attention: Any) -> bool:
    heads = getattr(attention, "heads", None)
    return isinstance(heads, int) and heads > 0 and attention.to_q.out_features >= heads


def is_fused(module: Any) -> bool:
    """Whether an attention projects with one layer that `fuse_qkv_projections()` made: a copy of its own three."""
    name = type(getattr(module, "processor", None)).__name__
    if name in ("FluxAttnProcessor", "FluxIPAdapterAttnProcessor"):  # these ask the module
        return bool(module.fused_projections)
    return name in ("FusedAttnProcessor2_0", "FusedJointAttnProcessor2_0")


def _is_apart(attention: Any) -> bool:
    """Whether it projects with three layers, whatever other ones were left in it."""
    return _has_heads(attention) and not is_fused(attention)


_IMAGE = f"q to_q, k to_k, v to_v, o {_OUT}"
_ADDED, _KEYS = "add_k_proj add_v_proj", layers("k add_k_proj, v add_v_proj")
_TEXT = layers("q add_q_proj, k add_k_proj, v add_v_proj, o to_add_out")


def _attention_and_hidden(attention: Any, rows: int) -> Sequence[Span]:
    """Queries, keys and values, then gate and value of the feed-forward: what Flux.2's single blocks make at once."""
    inner = attention.inner_dim
    rest = equal_parts(2, rows - 3 * inner)
    return [*equal_parts(3, 3 * inner), *(Span(3 * inner + span.start, span.size) for span in rest)]


def _heads_and_hidden(attention: Any, columns: int) -> Sequence[Span]:
    return [Span(0, attention.inner_dim), Span(attention.inner_dim, columns - attention.inner_dim)]


def _is_differential(attention: Any) -> bool:
    return getattr(attention, "use_differential", False) is True


def _of_two_softmaxes(*shares: int) -> SplitRows:
    """Queries and keys of both softmaxes one after the other, and the values that they share."""
    return lambda _, rows: side_by_side(*(rows // sum(shares) * share for share in shares))


_BOTH = "to_q to_k to_v add_q_proj add_k_proj add_v_proj"

DIFFUSION_ATTENTIONS: tuple[AttentionTemplate, ...] = (
    AttentionTemplate(
        _BOTH,
        streams={"img": layers(_IMAGE), "txt": _TEXT},
        when=lambda one: is_class(one, "diffusers", "MochiAttention"),
        refused="attends to each sample by itself, to leave out the padding of its text",
    ),
    AttentionTemplate(_BOTH, streams={"img": layers(_IMAGE), "txt": _TEXT}, heads=_heads, when=_has_heads),
    AttentionTemplate(
        _BOTH,
        streams={"txt": layers(_IMAGE), "img": _TEXT},
        when=lambda one: not _has_heads(one) and getattr(one, "num_key_value_heads", 0) > 0,
        refused="attends twice, once for each stream",
    ),
    AttentionTemplate(
        "to_q to_k to_v to_q_t to_k_t to_v_t",
        streams={"img": layers(_IMAGE), "txt": layers("q to_q_t, k to_k_t, v to_v_t, o to_out_t")},
        heads=_heads,
        when=_has_heads,
    ),
    AttentionTemplate(
        "to_qkv_mlp_proj to_out",
        (
            Fused((*QKV, "mlp.gate", "mlp.up"), "to_qkv_mlp_proj", _attention_and_hidden),
            FusedInput(("*.o", "mlp.down"), "to_out", _heads_and_hidden),
        ),
        when=lambda one: getattr(one, "mlp_mult_factor", None) == 2,
    ),
    AttentionTemplate(
        "img_attn_qkv txt_attn_qkv",
        streams={name: layers(f"q+k+v {name}_attn_qkv, o {name}_attn_proj") for name in ("img", "txt")},
    ),
    AttentionTemplate(
        "img_qkv_proj txt_kv_proj",
        streams={"img": layers(f"q+k+v img_qkv_proj, o {_OUT}"), "txt": layers("k+v txt_kv_proj")},
    ),
    attention(
        _IMAGE,
        also=_ADDED,
        streams={"txt": _KEYS},
        heads=_heads,
        when=lambda one: is_class(one, "diffusers", "Attention"),
    ),
    attention(_IMAGE, also=_ADDED, streams={"img": _KEYS}, refused="attends twice, to text and to an image"),
    attention(
        _IMAGE,
        when=lambda one: is_class(one, "diffusers", "QwenImage21Attention"),
        refused="attends to each segment by itself",
    ),
    attention(_IMAGE, heads=_heads, when=_is_apart),
    apart("to_query", "to_key", "to_value", "out_layer", also="out_layer"),
    attention("q q_linear, k+v kv_linear, o proj", also="proj"),
    *(
        attention(
            f"{told}, o {_OUT}",
            _of_two_softmaxes(*shares),
            "to_out",
            when=_is_differential,
            refused="takes a second softmax from the first, with keys of its own",
        )
        for told, shares in (("q+k+v to_qkv", (2, 2, 1)), ("q to_q, k+v to_kv", (2, 1)))
    ),
    attention(f"q+k+v to_qkv, o {_OUT}", also="to_out", when=lambda one: not _is_differential(one)),
    attention(f"q to_q, k+v to_kv, o {_OUT}", also="to_out", when=lambda one: not _is_differential(one)),
    apart("query", "key", "value", "proj_attn", also="proj_attn"),
)
"""The first that matches is a module's."""


def _is_gated(*names: str) -> Any:
    return lambda forward: any(is_class(forward.net[0], "diffusers", name) for name in names)


def _is_swiglu(forward: Any) -> bool:
    return "SwiGLU" in type(forward.act_fn).__name__


def _width_of_values(block: Any, columns: int) -> Sequence[Span]:
    """What a single block's output projection sees: the heads' outputs, then the hidden layer."""
    width = block.attn.to_v.out_features
    return Span(0, width), Span(width, columns - width)


DIFFUSION_FEED_FORWARDS: tuple[Template, ...] = (
    packed("net.0.proj", "net.2", "*.up *.gate", _is_gated("GEGLU", "SwiGLU")),
    Template(
        "attn.to_q attn.to_k attn.to_v proj_mlp proj_out",
        (Weight("*.up", "proj_mlp"), FusedInput(("attn.o", "*.down"), "proj_out", _width_of_values)),
    ),
    replace(packed("linear_in", "linear_out", "*.gate *.up", _is_swiglu), has="linear_in linear_out act_fn"),
    gated("linear_1", "linear_2", "out_projection"),
    replace(gated("linear_1", "linear_3", "linear_2"), has="linear_1 linear_2 linear_3 silu"),
    gated("gate_proj", "up_proj", "linear_fc2"),
    gated("gate_layer", "proj", "out"),
    gated("gate", "up", "down"),
    replace(plain("in_layer", "out_layer"), has="in_layer activation out_layer"),
    packed("ff_in", "ff_out", "*.up *.gate"),
)
"""The first that matches is a module's."""
