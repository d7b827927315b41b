"""Decoders whose attention goes through transformers' attention interface: Llama and its kin, GPT-2, OPT, GPT-NeoX."""

from __future__ import annotations

from typing import Any

from adapterkit.backends.longer import longer_counting_decoder, longer_decoder
from adapterkit.backends.transformers_family import Family
from adapterkit.mapping.family import Attention, Entry, Fused, Group, Output, Read, Tokens, Weight, grouped_heads
from adapterkit.plugins.classes import LANGUAGE
from adapterkit.points import Span


def _llama_heads(attention: Any) -> tuple[int, int]:
    # Counted on the projection: head_dim need not be hidden size / heads, and kv heads may be fewer than heads.
    return attention.k_proj.out_features // attention.head_dim, attention.head_dim


def _phi3_heads(attention: Any) -> tuple[int, int]:
    return attention.num_key_value_heads, attention.head_dim


def _phi3_rows(block: Any, rows: int) -> list[Span]:
    keys = block.self_attn.num_key_value_heads * block.self_attn.head_dim
    return [Span(0, rows - 2 * keys), Span(rows - 2 * keys, keys), Span(rows - keys, keys)]


def _gpt2_heads(attention: Any) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


def _neox_heads(attention: Any) -> tuple[int, int]:
    return attention.dense.in_features // attention.head_size, attention.head_size


def _neox_rows(block: Any, rows: int) -> list[Span]:
    return grouped_heads(rows, *_neox_heads(block.attention))


_LLAMA_STEM = Group(
    "model|transformer|", "", (Weight("embed.tokens", "embed_tokens"), Tokens("tokens", "embed_tokens"))
)
_LLAMA_BLOCKS = "model.layers.{layer}|transformer.layers.{layer}|layers.{layer}"
_LLAMA_HEAD = Group("", "", (Weight("head", "lm_head|score|qa_outputs"),))
_LLAMA_ATTENTION: tuple[Entry, ...] = (
    Weight("attn.q", "self_attn.q_proj"),
    Weight("attn.k", "self_attn.k_proj"),
    Weight("attn.v", "self_attn.v_proj"),
    Weight("attn.o", "self_attn.o_proj"),
    Attention("attn.kv", "self_attn", _llama_heads),
)
_LLAMA_MLP: tuple[Entry, ...] = (
    Weight("mlp.gate", "mlp.gate_proj"),
    Weight("mlp.up", "mlp.up_proj"),
    Weight("mlp.down", "mlp.down_proj"),
)

LLAMA = Family(
    rotary=True,
    lengthening=longer_decoder,
    classes=LANGUAGE["llama"],
    groups=(
        _LLAMA_STEM,
        Group(
            _LLAMA_BLOCKS,
            "{layer}",
            (
                *_LLAMA_ATTENTION,
                Output("attn", "self_attn.o_proj", residual="input_layernorm", norm_in="input_layernorm"),
                *_LLAMA_MLP,
                Output("mlp", "mlp.down_proj", residual="post_attention_layernorm", norm_in="post_attention_layernorm"),
            ),
        ),
        _LLAMA_HEAD,
    ),
)

# A norm on either side of each sublayer: the one behind it belongs to the sublayer, before the residual is added.
# Gemma 3 by its text classes alone: its other classes hold a vision tower too.
GEMMA = Family(
    rotary=True,
    lengthening=longer_decoder,
    classes=LANGUAGE["gemma"],
    groups=(
        _LLAMA_STEM,
        Group(
            _LLAMA_BLOCKS,
            "{layer}",
            (
                *_LLAMA_ATTENTION,
                Output("attn", "post_attention_layernorm", residual="input_layernorm", norm_in="input_layernorm"),
                *_LLAMA_MLP,
                Output(
                    "mlp",
                    "post_feedforward_layernorm",
                    residual="pre_feedforward_layernorm",
                    norm_in="pre_feedforward_layernorm",
                ),
            ),
        ),
        _LLAMA_HEAD,
    ),
)

PHI3 = Family(
    rotary=True,
    lengthening=longer_decoder,
    classes=LANGUAGE["phi3"],
    groups=(
        _LLAMA_STEM,
        Group(
            _LLAMA_BLOCKS,
            "{layer}",
            (
                Fused(("attn.q", "attn.k", "attn.v"), "self_attn.qkv_proj", _phi3_rows),
                Weight("attn.o", "self_attn.o_proj"),
                Attention("attn.kv", "self_attn", _phi3_heads),
                Output("attn", "resid_attn_dropout", residual="input_layernorm", norm_in="input_layernorm"),
                Fused(("mlp.gate", "mlp.up"), "mlp.gate_up_proj"),
                Weight("mlp.down", "mlp.down_proj"),
                Output(
                    "mlp",
                    "resid_mlp_dropout",
                    residual="post_attention_layernorm",
                    norm_in="post_attention_layernorm",
                ),
            ),
        ),
        _LLAMA_HEAD,
    ),
)

GPT2 = Family(
    lengthening=longer_decoder,
    classes=LANGUAGE["gpt2"],
    groups=(
        Group(
            "transformer|", "", (Weight("embed.tokens", "wte"), Weight("embed.pos", "wpe"), Tokens("tokens", "drop"))
        ),
        Group(
            "transformer.h.{layer}|h.{layer}",
            "{layer}",
            (
                Fused(("attn.q", "attn.k", "attn.v"), "attn.c_attn"),
                Weight("attn.o", "attn.c_proj"),
                Attention("attn.kv", "attn", _gpt2_heads),
                Output("attn", "attn.resid_dropout", residual="ln_1", norm_in="ln_1"),
                Weight("cross.q", "crossattention.q_attn"),
                Fused(("cross.k", "cross.v"), "crossattention.c_attn"),
                Weight("cross.o", "crossattention.c_proj"),
                Attention("cross.kv", "crossattention", _gpt2_heads),
                Output("cross", "crossattention.resid_dropout", residual="ln_cross_attn", norm_in="ln_cross_attn"),
                Weight("mlp.up", "mlp.c_fc"),
                Weight("mlp.down", "mlp.c_proj"),
                Output("mlp", "mlp.dropout", residual="ln_2", norm_in="ln_2"),
            ),
        ),
        Group(
            "",
            "",
            (
                Weight("head", "lm_head|score|classifier|qa_outputs"),
                Weight("head.choice", "multiple_choice_head.summary"),
            ),
        ),
    ),
)

# Attention and MLP either follow each other or both read the block's input (`use_parallel_residual`): each norm's input
# is the residual stream of its own sublayer in both cases.
NEOX = Family(
    rotary=True,
    lengthening=longer_decoder,
    classes=LANGUAGE["neox"],
    groups=(
        Group("gpt_neox|", "", (Weight("embed.tokens", "embed_in"), Tokens("tokens", "emb_dropout|embed_in"))),
        Group(
            "gpt_neox.layers.{layer}|layers.{layer}",
            "{layer}",
            (
                Fused(("attn.q", "attn.k", "attn.v"), "attention.query_key_value", _neox_rows),
                Weight("attn.o", "attention.dense"),
                Attention("attn.kv", "attention", _neox_heads),
                Output("attn", "post_attention_dropout", residual="input_layernorm", norm_in="input_layernorm"),
                Weight("mlp.up", "mlp.dense_h_to_4h"),
                Weight("mlp.down", "mlp.dense_4h_to_h"),
                Output(
                    "mlp",
                    "post_mlp_dropout",
                    residual="post_attention_layernorm",
                    norm_in="post_attention_layernorm",
                ),
            ),
        ),
        Group("", "", (Weight("head", "lm_head|embed_out|score|classifier|qa_outputs"),)),
    ),
)


def _opt(attention: Output, mlp: Output) -> tuple[Group, ...]:
    stem = (
        Weight("embed.tokens", "embed_tokens"),
        # Called with a mask, it looks up positions of its own making: an adapter cannot take its input for indices.
        Read("embed.pos", "embed_positions", form="embedding"),
        Weight("embed.proj", "project_in"),
        Weight("head.proj", "project_out"),
        Tokens("tokens", "embed_tokens"),
    )
    block = (
        Weight("attn.q", "self_attn.q_proj"),
        Weight("attn.k", "self_attn.k_proj"),
        Weight("attn.v", "self_attn.v_proj"),
        Weight("attn.o", "self_attn.out_proj"),
        Attention("attn.kv", "self_attn", _llama_heads),
        attention,
        Weight("mlp.up", "fc1"),
        Weight("mlp.down", "fc2"),
        mlp,
    )
    return (
        Group("model.decoder|decoder|", "", stem),
        Group("model.decoder.layers.{layer}|decoder.layers.{layer}|layers.{layer}", "{layer}", block),
        Group("", "", (Weight("head", "lm_head|score|qa_outputs"),)),
    )


OPT = Family(
    lengthening=longer_counting_decoder,
    classes=LANGUAGE["opt"],
    groups=_opt(
        Output("attn", "self_attn.out_proj", residual="self_attn_layer_norm", norm_in="self_attn_layer_norm"),
        Output("mlp", "fc2", residual="final_layer_norm", norm_in="final_layer_norm"),
    ),
    when=lambda config: config.do_layer_norm_before,
)

OPT_POST_NORM = Family(
    lengthening=longer_counting_decoder,
    classes=LANGUAGE["opt"],
    groups=_opt(
        Output("attn", "self_attn.out_proj", residual="self_attn", norm_out="self_attn_layer_norm"),
        Output("mlp", "fc2", residual="fc1", norm_out="final_layer_norm"),
    ),
)
