"""Attentions and feed-forwards of diffusion models: two streams in one softmax, projections that are fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterkit.mapping.entries import Fused, FusedInput, SplitRows, Weight, equal_parts
from adapterkit.mapping.layouts import is_class
from adapterkit.mapping.templates.template import AttentionTemplate, Template
from adapterkit.points import Span

_OUT = "to_out.0|to_out"
_QKV = ("*.q", "*.k", "*.v")


def _heads(attention: Any) -> tuple[int, int, int]:
    """`heads` counts those of queries; keys may have fewer."""
    width = attention.to_q.out_features // attention.heads
    groups = attention.to_k.out_features // width
    return groups, width, attention.to_v.out_features // groups


def _has_heads(attention: Any) -> bool:
    heads = getattr(attention, "heads", None)
    return isinstance(heads, int) and heads > 0 and attention.to_q.out_features >= heads


def _projections(q: str, k: str, v: str, o: str) -> tuple[Weight, ...]:
    return tuple(Weight(f"*.{part}", path) for part, path in zip("qkvo", (q, k, v, o), strict=True))


_IMAGE = _projections("to_q", "to_k", "to_v", _OUT)
_ADDED = (Weight("*.k", "add_k_proj"), Weight("*.v", "add_v_proj"))
_TEXT = _projections("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def _attention_and_hidden(attention: Any, rows: int) -> Sequence[Span]:
    """Queries, keys and values, then gate and value of the feed-forward: what Flux.2's single blocks make at once."""
    inner = attention.inner_dim
    rest = equal_parts(2, rows - 3 * inner)
    return [*equal_parts(3, 3 * inner), *(Span(3 * inner + span.start, span.size) for span in rest)]


def _heads_and_hidden(attention: Any, columns: int) -> Sequence[Span]:
    return [Span(0, attention.inner_dim), Span(attention.inner_dim, columns - attention.inner_dim)]


def _is_differential(attention: Any) -> bool:
    return getattr(attention, "use_differential", False) is True


_SECOND_SOFTMAX = "takes a second softmax from the first, with keys of its own"


def _of_two_softmaxes(*shares: int) -> SplitRows:
    """Queries and keys of both softmaxes one after the other, and the values that they share."""

    def split(attention: Any, rows: int) -> Sequence[Span]:
        one = rows // sum(shares)
        return [Span(one * sum(shares[:i]), one * share) for i, share in enumerate(shares)]

    return split


DIFFUSION_ATTENTIONS: tuple[AttentionTemplate, ...] = (
    AttentionTemplate(
        "to_q to_k to_v add_q_proj add_k_proj add_v_proj",
        streams={"img": _IMAGE, "txt": _TEXT},
        when=lambda one: is_class(one, "diffusers", "MochiAttention"),
        refused="attends to each sample by itself, to leave out the padding of its text",
    ),
    AttentionTemplate(
        "to_q to_k to_v add_q_proj add_k_proj add_v_proj",
        streams={"img": _IMAGE, "txt": _TEXT},
        heads=_heads,
        when=_has_heads,
    ),
    AttentionTemplate(
        "to_q to_k to_v add_q_proj add_k_proj add_v_proj",
        streams={"txt": _IMAGE, "img": _TEXT},
        when=lambda one: not _has_heads(one) and getattr(one, "num_key_value_heads", 0) > 0,
        refused="attends twice, once for each stream",
    ),
    AttentionTemplate(
        "to_q to_k to_v to_q_t to_k_t to_v_t",
        streams={"img": _IMAGE, "txt": _projections("to_q_t", "to_k_t", "to_v_t", "to_out_t")},
        heads=_heads,
        when=_has_heads,
    ),
    AttentionTemplate(
        "to_qkv_mlp_proj to_out",
        (
            Fused((*_QKV, "mlp.gate", "mlp.up"), "to_qkv_mlp_proj", _attention_and_hidden),
            FusedInput(("*.o", "mlp.down"), "to_out", _heads_and_hidden),
        ),
        when=lambda one: getattr(one, "mlp_mult_factor", None) == 2,
    ),
    AttentionTemplate(
        "img_attn_qkv txt_attn_qkv",
        streams={
            "img": (Fused(_QKV, "img_attn_qkv"), Weight("*.o", "img_attn_proj")),
            "txt": (Fused(_QKV, "txt_attn_qkv"), Weight("*.o", "txt_attn_proj")),
        },
    ),
    AttentionTemplate(
        "img_qkv_proj txt_kv_proj",
        streams={
            "img": (Fused(_QKV, "img_qkv_proj"), Weight("*.o", _OUT)),
            "txt": (Fused(("*.k", "*.v"), "txt_kv_proj"),),
        },
    ),
    AttentionTemplate(
        "to_q to_k to_v add_k_proj add_v_proj",
        _IMAGE,
        streams={"txt": _ADDED},
        heads=_heads,
        when=lambda one: is_class(one, "diffusers", "Attention"),
    ),
    AttentionTemplate(
        "to_q to_k to_v add_k_proj add_v_proj",
        _IMAGE,
        streams={"img": _ADDED},
        refused="attends twice, to text and to an image",
    ),
    AttentionTemplate(
        "to_q to_k to_v",
        _IMAGE,
        when=lambda one: is_class(one, "diffusers", "QwenImage21Attention"),
        refused="attends to each segment by itself",
    ),
    AttentionTemplate("to_q to_k to_v", _IMAGE, "to_qkv to_kv", heads=_heads, when=_has_heads),
    AttentionTemplate(
        "to_query to_key to_value out_layer", _projections("to_query", "to_key", "to_value", "out_layer")
    ),
    AttentionTemplate(
        "q_linear kv_linear proj",
        (Weight("*.q", "q_linear"), Fused(("*.k", "*.v"), "kv_linear"), Weight("*.o", "proj")),
    ),
    AttentionTemplate(
        "to_qkv to_out",
        (Fused(_QKV, "to_qkv", _of_two_softmaxes(2, 2, 1)), Weight("*.o", _OUT)),
        when=_is_differential,
        refused=_SECOND_SOFTMAX,
    ),
    AttentionTemplate(
        "to_q to_kv to_out",
        (Weight("*.q", "to_q"), Fused(("*.k", "*.v"), "to_kv", _of_two_softmaxes(2, 1)), Weight("*.o", _OUT)),
        when=_is_differential,
        refused=_SECOND_SOFTMAX,
    ),
    AttentionTemplate(
        "to_qkv to_out", (Fused(_QKV, "to_qkv"), Weight("*.o", _OUT)), when=lambda one: not _is_differential(one)
    ),
    AttentionTemplate(
        "to_q to_kv to_out",
        (Weight("*.q", "to_q"), Fused(("*.k", "*.v"), "to_kv"), Weight("*.o", _OUT)),
        when=lambda one: not _is_differential(one),
    ),
    AttentionTemplate("query key value proj_attn", _projections("query", "key", "value", "proj_attn")),
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
    Template(
        "net.0.proj net.2",
        (Fused(("*.up", "*.gate"), "net.0.proj"), Weight("*.down", "net.2")),
        when=_is_gated("GEGLU", "SwiGLU"),
    ),
    Template(
        "attn.to_q attn.to_k attn.to_v proj_mlp proj_out",
        (Weight("*.up", "proj_mlp"), FusedInput(("attn.o", "*.down"), "proj_out", _width_of_values)),
    ),
    Template(
        "linear_in linear_out act_fn",
        (Fused(("*.gate", "*.up"), "linear_in"), Weight("*.down", "linear_out")),
        when=_is_swiglu,
    ),
    Template(
        "linear_1 linear_2 out_projection",
        (Weight("*.gate", "linear_1"), Weight("*.up", "linear_2"), Weight("*.down", "out_projection")),
    ),
    Template(
        "linear_1 linear_2 linear_3 silu",
        (Weight("*.gate", "linear_1"), Weight("*.up", "linear_3"), Weight("*.down", "linear_2")),
    ),
    Template(
        "gate_proj up_proj linear_fc2",
        (Weight("*.gate", "gate_proj"), Weight("*.up", "up_proj"), Weight("*.down", "linear_fc2")),
    ),
    Template("gate_layer proj out", (Weight("*.gate", "gate_layer"), Weight("*.up", "proj"), Weight("*.down", "out"))),
    Template("gate up down", (Weight("*.gate", "gate"), Weight("*.up", "up"), Weight("*.down", "down"))),
    Template("in_layer activation out_layer", (Weight("*.up", "in_layer"), Weight("*.down", "out_layer"))),
    Template("ff_in ff_out", (Fused(("*.up", "*.gate"), "ff_in"), Weight("*.down", "ff_out"))),
)
"""The first that matches is a module's."""
