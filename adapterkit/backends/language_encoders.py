"""Encoders: BERT and RoBERTa, DeBERTa-v2 with its relative positions, ModernBERT."""

from __future__ import annotations

from typing import Any

from adapterkit.backends.language_attention import DebertaAttentionSeam
from adapterkit.backends.longer import longer_blocks, longer_single_decoder
from adapterkit.backends.transformers_family import Family, stacked
from adapterkit.mapping.family import Fused, Output, Read, Tokens, Weight
from adapterkit.mapping.templates.blocks import before
from adapterkit.plugins.classes import LANGUAGE

_POSITIONS = (
    Weight("embed.pos", "embeddings.position_embeddings"),
    Weight("embed.type", "embeddings.token_type_embeddings"),
)
_TOKENS = Weight("embed.tokens", "embeddings.word_embeddings")

_BERT = stacked(
    "bert roberta electra",
    (
        _TOKENS,
        *_POSITIONS,
        Weight("embed.proj", "embeddings_project"),
        Tokens("tokens", "embeddings.dropout"),
        Weight("head.pooler", "pooler.dense"),
    ),
    "encoder.layer.{layer}",
    (
        Weight(
            "head",
            "cls.predictions.decoder|lm_head.decoder|classifier.out_proj|classifier|qa_outputs|"
            "generator_lm_head|discriminator_predictions.dense_prediction",
        ),
        Weight(
            "head.transform",
            "cls.predictions.transform.dense|lm_head.dense|classifier.dense|"
            "generator_predictions.dense|discriminator_predictions.dense",
        ),
        Weight("head.next", "cls.seq_relationship"),
    ),
)


def _deberta(tokens: Weight | Read, **options: Any) -> Family:
    """As BERT, and relative positions: one table of them that every layer reads, and projections of it."""
    groups = stacked(
        "deberta",
        (
            tokens,
            *_POSITIONS,
            Weight("embed.proj", "embeddings.embed_proj"),
            Read("embed.relative", "encoder.rel_embeddings", form="embedding"),
            Tokens("tokens", "embeddings.word_embeddings"),
            Weight("conv", "encoder.conv.conv"),
        ),
        "encoder.layer.{layer}",
        (
            Weight("head", "cls.predictions.decoder|classifier|qa_outputs"),
            Weight("head.transform", "cls.predictions.transform.dense|lm_predictions.lm_head.dense"),
            Weight("head.pooler", "pooler.dense"),
        ),
        Weight("attn.pos_q", "attention.self.pos_query_proj"),
        Weight("attn.pos_k", "attention.self.pos_key_proj"),
    )
    return Family(LANGUAGE["deberta"], groups, seam=DebertaAttentionSeam, lengthening=longer_single_decoder, **options)


# The half of `Wi` that goes through the activation is the first: `mlp.gate`, as everywhere. What the model's file calls
# the gate is the factor beside it, `mlp.up`.
_MODERNBERT = stacked(
    "model",
    (Weight("embed.tokens", "embeddings.tok_embeddings"), Tokens("tokens", "embeddings.drop")),
    "layers.{layer}",
    (Weight("head.transform", "head.dense"), Weight("head", "decoder|classifier")),
    # The first layer's norm is an identity, which tells no width.
    Output("attn", "attn.out_drop", residual="attn_norm", norm_in="attn_norm", width="attn"),
    Fused(("mlp.gate", "mlp.up"), "mlp.Wi"),
    Weight("mlp.down", "mlp.Wo"),
    before("mlp", "mlp.Wo", "mlp_norm"),
)

ENCODERS = (
    Family(LANGUAGE["bert"], _BERT, lengthening=longer_blocks, beside="encoder"),
    _deberta(_TOKENS, when=lambda config: getattr(config, "legacy", True)),
    # Where the head is not the legacy one it multiplies by the token embedding itself, beside the call that embeds.
    _deberta(Read("embed.tokens", "embeddings.word_embeddings", form="embedding")),
    Family(LANGUAGE["modernbert"], _MODERNBERT, lengthening=longer_single_decoder, rotary=True),
)
