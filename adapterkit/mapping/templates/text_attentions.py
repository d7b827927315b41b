"""Attentions of language models that are arranged in their own way: fused, latent, or without a softmax."""

from __future__ import annotations

from typing import Any

from adapterkit.mapping.entries import Fused, Weight, equal_parts, grouped_heads
from adapterkit.mapping.layouts import is_class
from adapterkit.mapping.templates.attentions import apart
from adapterkit.mapping.templates.template import AttentionTemplate
from adapterkit.points import Span

_QKV = ("*.q", "*.k", "*.v")
_CLOSED = "lays its keys out so that no others can join them"
_COUNTS = ("num_attention_heads", "num_heads", "n_head")


def _heads(attention: Any) -> int:
    """How many heads of queries a module has; an error where it does not tell, as its forward would give."""
    return next(int(count) for name in _COUNTS if isinstance(count := getattr(attention, name, None), int))


def _head_by_head(attention: Any, rows: int) -> list[Span]:
    """Every head's queries, keys and values: [heads, 3, head_dim]."""
    heads = _heads(attention)
    return grouped_heads(rows, heads, rows // heads // 3)


def _in_disentangled(attention: Any, rows: int) -> list[Span]:
    return _head_by_head(attention.self, rows)


def _grouped(attention: Any, rows: int) -> list[Span]:
    """All queries, then the keys and the values of fewer heads; or thirds."""
    keys = getattr(attention, "num_key_value_heads", 0) * getattr(attention, "head_dim", 0)
    if not keys:
        return equal_parts(3, rows)
    return [Span(0, rows - 2 * keys), Span(rows - 2 * keys, keys), Span(rows - keys, keys)]


def _big_code(attention: Any, rows: int) -> list[Span]:
    """One head of keys for all queries, or head by head."""
    if not attention.multi_query:
        return _head_by_head(attention, rows)
    keys = attention.kv_dim
    return [Span(0, rows - 2 * keys), Span(rows - 2 * keys, keys), Span(rows - keys, keys)]


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
    heads = _heads(attention if "query_key_value" in attention._modules else attention.self)
    return heads, fused.out_features // heads // 3


_KV_LATENT = (
    Weight("*.kv_a", "kv_a_proj_with_mqa"),
    Weight("*.kv_b", "kv_b_proj"),
    Weight("*.o", "o_proj"),
)


def _closed(names: str, out: str, has: str = "", at: str = "") -> AttentionTemplate:
    """Layers of queries, keys and values, the latter laid out so that no others can join them: in windows, say."""
    weights = tuple(Weight(f"*.{role}", name) for role, name in zip("qkv", names.split(), strict=True))
    return AttentionTemplate(f"{names} {has}", (*weights, Weight("*.o", out)), at=at, refused=_CLOSED)


_APART = "q_proj k_proj v_proj out_proj"

WINDOWED: tuple[AttentionTemplate, ...] = (
    _closed("self.query self.key self.value", "output.dense", "self.query_global", "self"),
    _closed(
        "longformer_self_attn.query longformer_self_attn.key longformer_self_attn.value",
        "output",
        "longformer_self_attn.query_global",
        "longformer_self_attn",
    ),
    _closed(
        "q_proj k_proj v_proj", "post", "relative_position_embedding.pos_proj"
    ),  # Gemma 3n's sound: keys of each chunk
    *(
        _closed(f"{name}.q {name}.k {name}.v", f"{name}.o", at=name)
        for name in ("LocalSelfAttention", "TransientGlobalSelfAttention")
    ),
    AttentionTemplate(  # Pegasus-X: global tokens to all, and all to those of their block
        "q_proj k_proj v_proj out_proj",
        tuple(Weight(f"*.{part}", name) for part, name in zip("qkvo", _APART.split(), strict=True)),
        when=lambda one: is_class(one, "transformers", "PegasusXGlobalLocalAttention"),
        refused="takes two softmaxes, each over keys of its own",
    ),
)
"""To be asked before those of all keys, whose children they have too."""

TEXT_ATTENTIONS: tuple[AttentionTemplate, ...] = (
    AttentionTemplate(
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj",
        (Weight("*.q_a", "q_a_proj"), Weight("*.q_b", "q_b_proj"), *_KV_LATENT),
        heads=_latent,
    ),
    AttentionTemplate(
        "q_a_proj q_gate_proj kv_a_proj_with_mqa kv_b_proj o_proj",
        (Weight("*.q_a", "q_a_proj"), *_KV_LATENT),  # queries and their gate are one layer's
        heads=_latent,
    ),
    AttentionTemplate(
        "q_proj kv_a_proj_with_mqa kv_b_proj o_proj", (Weight("*.q", "q_proj"), *_KV_LATENT), heads=_latent
    ),
    AttentionTemplate(  # DeepSeek V4: keys are values, and joined by compressed ones
        "q_a_proj q_b_proj kv_proj o_b_proj",
        (Weight("*.q_a", "q_a_proj"), Weight("*.q_b", "q_b_proj"), Weight("*.o_b", "o_b_proj")),
        heads=lambda attention: (1, attention.head_dim),
    ),
    AttentionTemplate(
        "query_key_value dense",
        (Fused(_QKV, "query_key_value", _head_by_head), Weight("*.o", "dense")),
        heads=_equal_heads,
    ),
    AttentionTemplate("qkv_proj o_proj", (Fused(_QKV, "qkv_proj", _grouped), Weight("*.o", "o_proj"))),
    AttentionTemplate("Wqkv out_proj", (Fused(_QKV, "Wqkv", _grouped), Weight("*.o", "out_proj"))),
    AttentionTemplate(
        "qkv_proj out_proj attn_dropout resid_dropout",
        (Fused(_QKV, "qkv_proj", _in_four), Weight("*.o", "out_proj")),
    ),
    AttentionTemplate(
        "c_attn c_proj resid_dropout",
        (Fused(_QKV, "c_attn", _big_code), Weight("*.o", "c_proj")),
        without="attn_dropout q_attn",
        heads=_big_code_heads,
    ),
    AttentionTemplate("c_attn c_proj attn_dropout", (Fused(_QKV, "c_attn"), Weight("*.o", "c_proj")), refused=_CLOSED),
    AttentionTemplate(  # JetMoE: each head of keys once for every expert of queries
        "kv_proj",
        (Fused(("*.k", "*.v"), "kv_proj"),),
        without="q_proj query to_q q",
        heads=lambda attention: (attention.num_key_value_heads * attention.top_k, attention.head_dim),
    ),
    AttentionTemplate(
        "self.in_proj output.dense",
        (Fused(_QKV, "self.in_proj", _in_disentangled), Weight("*.o", "output.dense")),
        at="self",
        heads=_equal_heads,
    ),
    apart("self.query_proj", "self.key_proj", "self.value_proj", "output.dense", at="self"),
    apart("self_attention.query", "self_attention.key", "self_attention.value", "output.dense", at="self_attention"),
    _closed("project_q project_k project_v", "attention_out"),
    _closed(
        "query_proj key_proj value_proj", "out_proj", "relative_pos_embeddings"
    ),  # ProphetNet: keys of each step ahead
    apart("query_proj", "key_proj", "value_proj"),
    apart("q_head", "k_head", "v_head", "post_proj"),
    AttentionTemplate(  # of the hashed one queries are keys
        "self_attention.query_key self_attention.value output.dense",
        (Weight("*.v", "self_attention.value"), Weight("*.o", "output.dense")),
        at="self_attention",
    ),
    AttentionTemplate(
        "receptance key value output",
        (Weight("*.k", "key"), Weight("*.v", "value"), Weight("*.o", "output")),
        linear=True,
    ),
)
"""The first that matches is a module's."""
