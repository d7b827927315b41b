"""Decoders that compute their attention themselves and fuse its projections: Bloom, Falcon, MPT."""

from __future__ import annotations

from typing import Any

from adapterkit.backends.language_attention import BloomAttentionSeam, FalconAttentionSeam, MptAttentionSeam
from adapterkit.backends.longer import longer_single_decoder
from adapterkit.backends.transformers_family import Family
from adapterkit.mapping.family import Attention, Entry, Fused, Group, Output, Read, Tokens, Weight, grouped_heads
from adapterkit.plugins.classes import LANGUAGE
from adapterkit.points import Span


def _bloom_heads(attention: Any) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


def _bloom_rows(block: Any, rows: int) -> list[Span]:
    return grouped_heads(rows, *_bloom_heads(block.self_attention))


def _falcon_heads(attention: Any) -> tuple[int, int]:
    return attention.num_kv_heads, attention.head_dim


def _falcon_rows(block: Any, rows: int) -> list[Span]:
    return grouped_heads(rows, *_falcon_heads(block.self_attention))


def _mpt_heads(attention: Any) -> tuple[int, int]:
    return attention.n_heads, attention.head_dim


_HEAD = Group("", "", (Weight("head", "lm_head|score|classifier|qa_outputs"),))


def _bloom(attention: tuple[Entry, ...], mlp: tuple[Entry, ...]) -> tuple[Group, ...]:
    stem = (Weight("embed.tokens", "word_embeddings"), Tokens("tokens", "word_embeddings_layernorm"))
    block = (
        Fused(("attn.q", "attn.k", "attn.v"), "self_attention.query_key_value", _bloom_rows),
        Attention("attn.kv", "self_attention", _bloom_heads),
        *attention,
        Weight("mlp.up", "mlp.dense_h_to_4h"),
        *mlp,
    )
    return (
        Group("transformer|", "", stem),
        Group("transformer.h.{layer}|h.{layer}", "{layer}", block),
        _HEAD,
    )


_BLOOM_O = Weight("attn.o", "self_attention.dense")
_BLOOM_DOWN = Weight("mlp.down", "mlp.dense_4h_to_h")

# In this mode Bloom reads the weights slice by slice and calls neither module: there is no output to adapt.
BLOOM_SLICED = Family(
    lengthening=longer_single_decoder,
    classes=LANGUAGE["bloom"],
    groups=_bloom((Read("attn.o", "self_attention.dense"),), (Read("mlp.down", "mlp.dense_4h_to_h"),)),
    seam=BloomAttentionSeam,
    when=lambda config: config.pretraining_tp > 1 and config.slow_but_exact,
)

# The norm's output is what the residual connection carries on.
BLOOM_NORMED_RESIDUAL = Family(
    lengthening=longer_single_decoder,
    classes=LANGUAGE["bloom"],
    groups=_bloom(
        (_BLOOM_O, Output("attn", "self_attention.dense", residual="self_attention")),
        (_BLOOM_DOWN, Output("mlp", "mlp.dense_4h_to_h", residual="mlp")),
    ),
    seam=BloomAttentionSeam,
    when=lambda config: config.apply_residual_connection_post_layernorm,
)

BLOOM = Family(
    lengthening=longer_single_decoder,
    classes=LANGUAGE["bloom"],
    groups=_bloom(
        (_BLOOM_O, Output("attn", "self_attention.dense", residual="input_layernorm", norm_in="input_layernorm")),
        (
            _BLOOM_DOWN,
            Output(
                "mlp",
                "mlp.dense_4h_to_h",
                residual="post_attention_layernorm",
                norm_in="post_attention_layernorm",
            ),
        ),
    ),
    seam=BloomAttentionSeam,
)

# One sublayer after the other, or both side by side behind one norm, or behind two: the norm of a sublayer is the first
# of these that there is, and its input the residual stream.
_FALCON_NORM, _FALCON_MLP_NORM = "ln_attn|input_layernorm", "post_attention_layernorm|ln_mlp|input_layernorm"

FALCON = Family(
    rotary=True,
    lengthening=longer_single_decoder,
    classes=LANGUAGE["falcon"],
    groups=(
        Group("transformer|", "", (Weight("embed.tokens", "word_embeddings"), Tokens("tokens", "word_embeddings"))),
        Group(
            "transformer.h.{layer}|h.{layer}",
            "{layer}",
            (
                Fused(("attn.q", "attn.k", "attn.v"), "self_attention.query_key_value", _falcon_rows),
                Weight("attn.o", "self_attention.dense"),
                Attention("attn.kv", "self_attention", _falcon_heads),
                Output("attn", "self_attention.dense", residual=_FALCON_NORM, norm_in=_FALCON_NORM),
                Weight("mlp.up", "mlp.dense_h_to_4h"),
                Weight("mlp.down", "mlp.dense_4h_to_h"),
                Output("mlp", "mlp.dense_4h_to_h", residual=_FALCON_MLP_NORM, norm_in=_FALCON_MLP_NORM),
            ),
        ),
        _HEAD,
    ),
    seam=FalconAttentionSeam,
)

MPT = Family(
    hides=True,
    lengthening=longer_single_decoder,
    classes=LANGUAGE["mpt"],
    groups=(
        Group("transformer|", "", (Weight("embed.tokens", "wte"), Tokens("tokens", "wte"))),
        Group(
            "transformer.blocks.{layer}|blocks.{layer}",
            "{layer}",
            (
                Fused(("attn.q", "attn.k", "attn.v"), "attn.Wqkv"),
                Weight("attn.o", "attn.out_proj"),
                Attention("attn.kv", "attn", _mpt_heads),
                Output("attn", "resid_attn_dropout", residual="norm_1", norm_in="norm_1"),
                Weight("mlp.up", "ffn.up_proj"),
                Weight("mlp.down", "ffn.down_proj"),
                Output("mlp", "ffn.down_proj", residual="norm_2", norm_in="norm_2"),
            ),
        ),
        _HEAD,
    ),
    seam=MptAttentionSeam,
)
