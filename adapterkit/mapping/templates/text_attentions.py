"""Attentions of language models that are arranged in their own way: fused, latent, or without a softmax."""

from __future__ import annotations

from typing import Any

from adapterkit.mapping.entries import equal_parts, grouped_heads
from adapterkit.mapping.layouts import is_class
from adapterkit.mapping.templates.attentions import apart, attention
from adapterkit.mapping.templates.rows import heads_of, side_by_side
from adapterkit.mapping.templates.template import AttentionTemplate
from adapterkit.points import Span

_CLOSED = "lays its keys out so that no others can join them"


def _head_by_head(attention: Any, rows: int) -> list[Span]:
    """Every head's queries, keys and values: [heads, 3, head_dim]."""
    heads = heads_of(attention)
    return grouped_heads(rows, heads, rows // heads // 3)


def _in_disentangled(attention: Any, rows: int) -> list[Span]:
    return _head_by_head(attention.self, rows)


def _grouped(attention: Any, rows: int) -> list[Span]:
    """All queries, then the keys and the values of fewer heads; or thirds."""
    keys = getattr(attention, "num_key_value_heads", 0) * getattr(attention, "head_dim", 0)
    if not keys:
        return equal_parts(3, rows)
    return side_by_side(rows - 2 * keys, keys, keys)


def _big_code(attention: Any, rows: int) -> list[Span]:
    """One head of keys for all queries, or head by head."""
    if not attention.multi_query:
        return _head_by_head(attention, rows)
    keys = attention.kv_dim
    return side_by_side(rows - 2 * keys, keys, keys)


def _in_four(_: Any, rows: int) -> list[Span]:
    """Queries, values and keys of a quarter of the heads, four times."""
    part = rows // 12
    return [Span(start * part, part, 4, 3 * part) for start in (0, 2, 1)]


def _latent(attention: Any) -> tuple[int, int, int]:
    """Heads, and the widths of keys and values as they are once expanded, which is after the cache."""
    each = attention.qk_nope_head_dim + attention.v_head_dim
    return attention.kv_b_proj.out_features // each, attention.qk_head_dim, attention.v_head_dim


def _big_code_heads(attention: Any) -> tuple[int, int]:
    return attention.kv_heads, attention.head_dim


def _equal_heads(attention: Any) -> tuple[int, int]:
    fused = attention.query_key_value if "query_key_value" in attention._modules else attention.self.in_proj
    heads = heads_of(attention if "query_key_value" in attention._modules else attention.self)
    return heads, fused.out_features // heads // 3


_LATENT = "kv_a kv_a_proj_with_mqa, kv_b kv_b_proj, o o_proj"


def _closed(at: str, names: str, out: str, also: str = "") -> AttentionTemplate:
    """Layers of queries, keys and values, the latter laid out so that no others can join them: in windows, say.

    Args:
        at: What is in front of all names.
        names, out, also: See `attention`.
    """
    q, k, v = (f"{at}{name}" for name in names.split())
    return apart(q, k, v, out, also=f"{at}{also}" if also else "", at=at.rstrip("."), refused=_CLOSED)


WINDOWED: tuple[AttentionTemplate, ...] = (
    _closed("self.", "query key value", "output.dense", "query_global"),
    _closed("longformer_self_attn.", "query key value", "output", "query_global"),
    # Gemma 3n's sound: keys of each chunk.
    _closed("", "q_proj k_proj v_proj", "post", "relative_position_embedding.pos_proj"),
    _closed("", "q_proj.linear k_proj.linear v_proj.linear", "post.linear", "relative_k_proj"),  # Gemma 4's
    _closed("LocalSelfAttention.", "q k v", "LocalSelfAttention.o"),
    _closed("TransientGlobalSelfAttention.", "q k v", "TransientGlobalSelfAttention.o"),
    apart(  # Pegasus-X: global tokens to all, and all to those of their block
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        also="out_proj",
        when=lambda one: is_class(one, "transformers", "PegasusXGlobalLocalAttention"),
        refused="takes two softmaxes, each over keys of its own",
    ),
)
"""To be asked before those of all keys, whose children they have too."""

TEXT_ATTENTIONS: tuple[AttentionTemplate, ...] = (
    attention(f"q_a q_a_proj, q_b q_b_proj, {_LATENT}", also="o_proj", heads=_latent),
    # Queries and their gate are one layer's.
    attention(f"q_a q_a_proj, {_LATENT}", also="q_gate_proj o_proj", heads=_latent),
    attention(f"q q_proj, {_LATENT}", also="o_proj", heads=_latent),
    # DeepSeek V4: keys are values, and joined by compressed ones.
    attention(
        "q_a q_a_proj, q_b q_b_proj, o_b o_b_proj", also="kv_proj", heads=lambda attention: (1, attention.head_dim)
    ),
    attention("q+k+v query_key_value, o dense", _head_by_head, "dense", heads=_equal_heads),
    attention("q+k+v qkv_proj, o o_proj", _grouped, "o_proj"),
    attention("q+k+v Wqkv, o Wo|out_proj", _grouped),
    attention("q+k+v qkv_proj, o out_proj", _in_four, "out_proj attn_dropout resid_dropout"),
    attention(
        "q+k+v c_attn, o c_proj",
        _big_code,
        "c_proj resid_dropout",
        without="attn_dropout q_attn",
        heads=_big_code_heads,
    ),
    attention("q+k+v c_attn, o c_proj", also="c_proj attn_dropout", refused=_CLOSED),
    # JetMoE: each head of keys once for every expert of queries.
    attention(
        "k+v kv_proj",
        without="q_proj query to_q q",
        heads=lambda attention: (attention.num_key_value_heads * attention.top_k, attention.head_dim),
    ),
    attention("q+k+v self.in_proj, o output.dense", _in_disentangled, "output.dense", at="self", heads=_equal_heads),
    apart("self.query_proj", "self.key_proj", "self.value_proj", "output.dense", at="self"),
    apart("self_attention.query", "self_attention.key", "self_attention.value", "output.dense", at="self_attention"),
    _closed("", "project_q project_k project_v", "attention_out"),
    # ProphetNet: keys of each step ahead.
    _closed("", "query_proj key_proj value_proj", "out_proj", "relative_pos_embeddings"),
    apart("query_proj", "key_proj", "value_proj"),
    apart("linear_q", "linear_k", "linear_v", "linear_out"),
    apart("q_head", "k_head", "v_head", "post_proj"),
    # Of the hashed one queries are keys.
    attention(
        "v self_attention.value, o output.dense", also="self_attention.query_key output.dense", at="self_attention"
    ),
    attention("k key, v value, o output", also="receptance output", linear=True),
)
"""The first that matches is a module's."""
