"""Decoders whose attention goes through transformers' attention interface: Llama and its kin, GPT-2, OPT, GPT-NeoX."""

from __future__ import annotations

from typing import Any

from adapterkit.backends.longer import longer_counting_decoder, longer_decoder
from adapterkit.backends.transformers_family import Family, stacked
from adapterkit.mapping.family import Attention, Entry, Fused, Output, Read, Tokens, Weight
from adapterkit.mapping.templates.blocks import before
from adapterkit.plugins.classes import LANGUAGE

EMBEDDED = (Weight("embed.tokens", "embed_tokens"), Tokens("tokens", "embed_tokens"))
HEAD = (Weight("head", "lm_head|score|qa_outputs"),)
FURTHER_HEAD = (Weight("head", "lm_head|embed_out|score|classifier|qa_outputs"),)


def _llama(kind: str, *further: Entry) -> Family:
    """Llama's layout, and what of its blocks the templates do not say."""
    groups = stacked("model transformer", EMBEDDED, "layers.{layer}", HEAD, *further)
    return Family(LANGUAGE[kind], groups, rotary=True, lengthening=longer_decoder)


def _gpt2_heads(attention: Any) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


_GPT2 = stacked(
    "transformer",
    (Weight("embed.tokens", "wte"), Weight("embed.pos", "wpe"), Tokens("tokens", "drop")),
    "h.{layer}",
    (*FURTHER_HEAD, Weight("head.choice", "multiple_choice_head.summary")),
    Attention("attn.kv", "attn", _gpt2_heads),
    before("attn", "attn.resid_dropout", "ln_1"),
    Weight("cross.q", "crossattention.q_attn"),
    Fused(("cross.k", "cross.v"), "crossattention.c_attn"),
    Weight("cross.o", "crossattention.c_proj"),
    Attention("cross.kv", "crossattention", _gpt2_heads),
    before("cross", "crossattention.resid_dropout", "ln_cross_attn"),
    before("mlp", "mlp.dropout", "ln_2"),
)

# Attention and MLP either follow each other or both read the block's input (`use_parallel_residual`): each norm's input
# is the residual stream of its own sublayer in both cases.
_NEOX = stacked(
    "gpt_neox",
    (Weight("embed.tokens", "embed_in"), Tokens("tokens", "emb_dropout|embed_in")),
    "layers.{layer}",
    FURTHER_HEAD,
    before("attn", "post_attention_dropout", "input_layernorm"),
    before("mlp", "post_mlp_dropout", "post_attention_layernorm"),
)

_OPT_STEM = (
    *EMBEDDED,
    # Called with a mask, it looks up positions of its own making: an adapter cannot take its input for indices.
    Read("embed.pos", "embed_positions", form="embedding"),
    Weight("embed.proj", "project_in"),
    Weight("head.proj", "project_out"),
)


def _opt(*outputs: Output, **options: Any) -> Family:
    groups = stacked("model.decoder decoder", _OPT_STEM, "layers.{layer}", HEAD, *outputs)
    return Family(LANGUAGE["opt"], groups, lengthening=longer_counting_decoder, **options)


DECODERS = (
    _llama("llama"),
    _llama("gemma"),  # Gemma 3 by its text classes alone: its other classes hold a vision tower too
    _llama(
        "phi3",
        before("attn", "resid_attn_dropout", "input_layernorm"),
        Fused(("mlp.gate", "mlp.up"), "mlp.gate_up_proj"),
        Weight("mlp.down", "mlp.down_proj"),
        before("mlp", "resid_mlp_dropout", "post_attention_layernorm"),
    ),
    Family(LANGUAGE["gpt2"], _GPT2, lengthening=longer_decoder),
    Family(LANGUAGE["neox"], _NEOX, lengthening=longer_decoder, rotary=True),
    _opt(
        before("attn", "self_attn.out_proj", "self_attn_layer_norm"),
        before("mlp", "fc2", "final_layer_norm"),
        when=lambda config: config.do_layer_norm_before,
    ),
    _opt(
        Output("attn", "self_attn.out_proj", residual="self_attn", norm_out="self_attn_layer_norm"),
        Output("mlp", "fc2", residual="fc1", norm_out="final_layer_norm"),
    ),
)
