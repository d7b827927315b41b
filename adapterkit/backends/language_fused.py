"""Decoders that compute their attention themselves and fuse its projections: Bloom, Falcon, MPT."""

from __future__ import annotations

from typing import Any

from adapterkit.backends.language_attention import BloomAttentionSeam, FalconAttentionSeam, MptAttentionSeam
from adapterkit.backends.language_decoders import FURTHER_HEAD
from adapterkit.backends.longer import longer_single_decoder
from adapterkit.backends.transformers_family import Family, stacked
from adapterkit.mapping.family import Attention, Entry, Fused, Output, Read, Tokens, Weight, grouped_heads
from adapterkit.mapping.templates.blocks import before
from adapterkit.plugins.classes import LANGUAGE
from adapterkit.points import Span


def _falcon_heads(attention: Any) -> tuple[int, int]:
    return attention.num_kv_heads, attention.head_dim


def _falcon_rows(block: Any, rows: int) -> list[Span]:
    return grouped_heads(rows, *_falcon_heads(block.self_attention))


def _bloom(*further: Entry, **options: Any) -> Family:
    """Bloom's layout, with the outputs that its config gives it."""
    stem = (Weight("embed.tokens", "word_embeddings"), Tokens("tokens", "word_embeddings_layernorm"))
    groups = stacked("transformer", stem, "h.{layer}", FURTHER_HEAD, *further)
    return Family(LANGUAGE["bloom"], groups, BloomAttentionSeam, lengthening=longer_single_decoder, **options)


_FALCON = stacked(
    "transformer",
    (Weight("embed.tokens", "word_embeddings"), Tokens("tokens", "word_embeddings")),
    "h.{layer}",
    FURTHER_HEAD,
    Fused(("attn.q", "attn.k", "attn.v"), "self_attention.query_key_value", _falcon_rows),
    Attention("attn.kv", "self_attention", _falcon_heads),
    # One sublayer after the other, or both side by side behind one norm, or behind two: the norm of a sublayer is the
    # first of these that there is, and its input the residual stream.
    before("attn", "self_attention.dense", "ln_attn|input_layernorm"),
    before("mlp", "mlp.dense_4h_to_h", "post_attention_layernorm|ln_mlp|input_layernorm"),
)
_MPT = stacked(
    "transformer",
    (Weight("embed.tokens", "wte"), Tokens("tokens", "wte")),
    "blocks.{layer}",
    FURTHER_HEAD,
    before("attn", "resid_attn_dropout", "norm_1"),
    before("mlp", "ffn.down_proj", "norm_2"),
)

FUSED_DECODERS = (
    # In this mode Bloom reads the weights slice by slice and calls neither module: there is no output to adapt.
    _bloom(
        Read("attn.o", "self_attention.dense"),
        Read("mlp.down", "mlp.dense_4h_to_h"),
        when=lambda config: config.pretraining_tp > 1 and config.slow_but_exact,
    ),
    # The norm's output is what the residual connection carries on.
    _bloom(
        Output("attn", "self_attention.dense", residual="self_attention"),
        Output("mlp", "mlp.dense_4h_to_h", residual="mlp"),
        when=lambda config: config.apply_residual_connection_post_layernorm,
    ),
    _bloom(
        before("attn", "self_attention.dense", "input_layernorm"),
        before("mlp", "mlp.dense_4h_to_h", "post_attention_layernorm"),
    ),
    Family(LANGUAGE["falcon"], _FALCON, FalconAttentionSeam, lengthening=longer_single_decoder, rotary=True),
    Family(LANGUAGE["mpt"], _MPT, MptAttentionSeam, lengthening=longer_single_decoder, hides=True),
)
