"""Encoders: BERT and RoBERTa, DeBERTa-v2 with its relative positions, ModernBERT."""

from __future__ import annotations

from typing import Any

from adapterkit.backends.language_attention import DebertaAttentionSeam
from adapterkit.backends.longer import longer_blocks, longer_single_decoder
from adapterkit.backends.transformers_family import Family
from adapterkit.mapping.family import Attention, Fused, Group, Output, Read, Tokens, Weight
from adapterkit.plugins.classes import LANGUAGE


def _bert_heads(attention: Any) -> tuple[int, int]:
    return attention.num_attention_heads, attention.attention_head_size


def _modern_heads(attention: Any) -> tuple[int, int]:
    return attention.Wqkv.out_features // (3 * attention.head_dim), attention.head_dim


# Post-norm: the residual stream enters the `attention` module and the `intermediate` one, and each sublayer's last
# module before the sum is the dropout beside the norm.
BERT = Family(
    lengthening=longer_blocks,
    beside="encoder",
    classes=LANGUAGE["bert"],
    groups=(
        Group(
            "bert|roberta|electra|",
            "",
            (
                Weight("embed.tokens", "embeddings.word_embeddings"),
                Weight("embed.pos", "embeddings.position_embeddings"),
                Weight("embed.type", "embeddings.token_type_embeddings"),
                Weight("embed.proj", "embeddings_project"),
                Tokens("tokens", "embeddings.dropout"),
                Weight("head.pooler", "pooler.dense"),
            ),
        ),
        Group(
            "|".join(f"{base}encoder.layer.{{layer}}" for base in ("bert.", "roberta.", "electra.", "")),
            "{layer}",
            (
                Weight("attn.q", "attention.self.query"),
                Weight("attn.k", "attention.self.key"),
                Weight("attn.v", "attention.self.value"),
                Weight("attn.o", "attention.output.dense"),
                Attention("attn.kv", "attention.self", _bert_heads),
                Output("attn", "attention.output.dropout", residual="attention", norm_out="attention.output.LayerNorm"),
                Weight("cross.q", "crossattention.self.query"),
                Weight("cross.k", "crossattention.self.key"),
                Weight("cross.v", "crossattention.self.value"),
                Weight("cross.o", "crossattention.output.dense"),
                Attention("cross.kv", "crossattention.self", _bert_heads),
                Output(
                    "cross",
                    "crossattention.output.dropout",
                    residual="crossattention",
                    norm_out="crossattention.output.LayerNorm",
                ),
                Weight("mlp.up", "intermediate.dense"),
                Weight("mlp.down", "output.dense"),
                Output("mlp", "output.dropout", residual="intermediate", norm_out="output.LayerNorm"),
            ),
        ),
        Group(
            "",
            "",
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
        ),
    ),
)


def _deberta(tokens: Weight | Read) -> tuple[Group, ...]:
    """As BERT, and relative positions: one table of them that every layer reads, and projections of it."""
    stem = (
        tokens,
        Weight("embed.pos", "embeddings.position_embeddings"),
        Weight("embed.type", "embeddings.token_type_embeddings"),
        Weight("embed.proj", "embeddings.embed_proj"),
        Read("embed.relative", "encoder.rel_embeddings", form="embedding"),
        Tokens("tokens", "embeddings.word_embeddings"),
        Weight("conv", "encoder.conv.conv"),
    )
    block = (
        Weight("attn.q", "attention.self.query_proj"),
        Weight("attn.k", "attention.self.key_proj"),
        Weight("attn.v", "attention.self.value_proj"),
        Weight("attn.pos_q", "attention.self.pos_query_proj"),
        Weight("attn.pos_k", "attention.self.pos_key_proj"),
        Weight("attn.o", "attention.output.dense"),
        Attention("attn.kv", "attention.self", _bert_heads),
        Output("attn", "attention.output.dropout", residual="attention", norm_out="attention.output.LayerNorm"),
        Weight("mlp.up", "intermediate.dense"),
        Weight("mlp.down", "output.dense"),
        Output("mlp", "output.dropout", residual="intermediate", norm_out="output.LayerNorm"),
    )
    head = (
        Weight("head", "cls.predictions.decoder|classifier|qa_outputs"),
        Weight("head.transform", "cls.predictions.transform.dense|lm_predictions.lm_head.dense"),
        Weight("head.pooler", "pooler.dense"),
    )
    return (
        Group("deberta|", "", stem),
        Group("deberta.encoder.layer.{layer}|encoder.layer.{layer}", "{layer}", block),
        Group("", "", head),
    )


DEBERTA = Family(
    lengthening=longer_single_decoder,
    classes=LANGUAGE["deberta"],
    groups=_deberta(Weight("embed.tokens", "embeddings.word_embeddings")),
    seam=DebertaAttentionSeam,
    when=lambda config: getattr(config, "legacy", True),
)

# Where the head is not the legacy one it multiplies by the token embedding itself, beside the call that embeds.
DEBERTA_NEW_HEAD = Family(
    lengthening=longer_single_decoder,
    classes=LANGUAGE["deberta"],
    groups=_deberta(Read("embed.tokens", "embeddings.word_embeddings", form="embedding")),
    seam=DebertaAttentionSeam,
)

# The half of `Wi` that goes through the activation is the first: `mlp.gate`, as everywhere. What the model's file calls
# the gate is the factor beside it, `mlp.up`.
MODERNBERT = Family(
    rotary=True,
    lengthening=longer_single_decoder,
    classes=LANGUAGE["modernbert"],
    groups=(
        Group(
            "model|",
            "",
            (Weight("embed.tokens", "embeddings.tok_embeddings"), Tokens("tokens", "embeddings.drop")),
        ),
        Group(
            "model.layers.{layer}|layers.{layer}",
            "{layer}",
            (
                Fused(("attn.q", "attn.k", "attn.v"), "attn.Wqkv"),
                Weight("attn.o", "attn.Wo"),
                Attention("attn.kv", "attn", _modern_heads),
                # The first layer's norm is an identity, which tells no width.
                Output("attn", "attn.out_drop", residual="attn_norm", norm_in="attn_norm", width="attn"),
                Fused(("mlp.gate", "mlp.up"), "mlp.Wi"),
                Weight("mlp.down", "mlp.Wo"),
                Output("mlp", "mlp.Wo", residual="mlp_norm", norm_in="mlp_norm"),
            ),
        ),
        Group("", "", (Weight("head.transform", "head.dense"), Weight("head", "decoder|classifier"))),
    ),
)
