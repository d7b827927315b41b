"""Blocks, attentions and feed-forwards of transformers' vision and audio encoders, by the children that they have."""

from __future__ import annotations

from typing import Any

from adapterkit.mapping.entries import Fused, Output, Weight
from adapterkit.mapping.templates.attentions import apart
from adapterkit.mapping.templates.blocks import before, behind
from adapterkit.mapping.templates.feed_forwards import plain
from adapterkit.mapping.templates.template import AttentionTemplate, BlockTemplate, Template
from adapterkit.points import Span

_QKV = ("*.q", "*.k", "*.v")


def _by_heads(attention: Any, rows: int) -> list[Span]:
    """LeViT: rows [heads, queries + keys + values], of which values are wider."""
    step, narrow = rows // attention.num_attention_heads, attention.key_dim
    sizes = (narrow, narrow, step - 2 * narrow)
    return [Span(sum(sizes[:i]), size, attention.num_attention_heads, step) for i, size in enumerate(sizes)]


def _pairs_by_heads(attention: Any, rows: int) -> list[Span]:
    """LeViT, where tokens become fewer: rows [heads, keys + values]."""
    step, narrow = rows // attention.num_attention_heads, attention.key_dim
    return [
        Span(start, size, attention.num_attention_heads, step) for start, size in ((0, narrow), (narrow, step - narrow))
    ]


def _one_query(attention: Any, rows: int) -> list[Span]:
    """MobileViT 2: one score a token, then keys and values."""
    wide = (rows - 1) // 2
    return [Span(0, 1), Span(1, wide), Span(1 + wide, wide)]


PICTURE_ATTENTIONS: tuple[AttentionTemplate, ...] = (
    AttentionTemplate(  # Swin v2: a softmax over cosines, which keys of any length would not change
        "self.continuous_position_bias_mlp.0 self.query self.key self.value output.dense",
        (
            *(Weight(role, f"self.{name}") for role, name in zip(_QKV, ("query", "key", "value"), strict=True)),
            Weight("*.o", "output.dense"),
        ),
        at="self",
        linear=True,
    ),
    AttentionTemplate(  # Hiera: units of the mask are a further dimension of its queries, keys and values
        "qkv proj",
        (Fused(_QKV, "qkv"), Weight("*.o", "proj")),
        when=lambda one: isinstance(getattr(one, "use_mask_unit_attn", None), bool),
        linear=True,
    ),
    apart(
        "attention.projection_query",
        "attention.projection_key",
        "attention.projection_value",
        "output.dense",
        at="attention",
    ),
    AttentionTemplate(
        "queries_keys_values.linear projection.linear",
        (Fused(_QKV, "queries_keys_values.linear", _by_heads), Weight("*.o", "projection.linear")),
    ),
    AttentionTemplate(
        "keys_values.linear queries.linear projection.linear",
        (
            Weight("*.q", "queries.linear"),
            Fused(("*.k", "*.v"), "keys_values.linear", _pairs_by_heads),
            Weight("*.o", "projection.linear"),
        ),
    ),
    AttentionTemplate(
        "qkv_proj.convolution out_proj.convolution",
        (Fused(_QKV, "qkv_proj.convolution", _one_query), Weight("*.o", "out_proj.convolution")),
        linear=True,
    ),
)
"""The first that matches is a module's."""

PICTURE_FEED_FORWARDS: tuple[Template, ...] = (
    plain("dense1", "dense2"),
    plain("intermediate_dense", "output_dense"),
    plain("linear_up.linear", "linear_down.linear"),
)
"""The first that matches is a module's."""


def _attention(sublayer: str, norm: str, names: str = "dropout|dense") -> Output:
    """The output of an attention whose projection is a module of its own."""
    return before("attn", sublayer, norm, "|".join(f"{sublayer}.output.{name}" for name in names.split("|")))


def _within(role: str, sublayer: str) -> Output:
    """A sublayer that holds its norm and its dropout."""
    return Output(role, f"{sublayer}.dropout", residual=f"{sublayer}.layer_norm", norm_in=f"{sublayer}.layer_norm")


PICTURE_BLOCKS: tuple[BlockTemplate, ...] = (
    BlockTemplate(
        "pre_attention_layer_norm attention pre_mlp_layer_norm mlp",
        (
            before("attn", "attention", "pre_attention_layer_norm", "attention.output"),
            before("mlp", "mlp", "pre_mlp_layer_norm"),
        ),
    ),
    BlockTemplate(
        "self_attn_layer_norm self_attn final_layer_norm ffn",
        (
            before("attn", "self_attn", "self_attn_layer_norm", "self_attn.out_proj"),
            before("mlp", "ffn", "final_layer_norm"),
        ),
    ),
    BlockTemplate(
        "self_attention.layer_norm self_attention.dropout mlp.layer_norm mlp.dropout",
        (
            _within("attn", "self_attention"),
            _within("cross", "encoder_decoder_attention"),
            _within("mlp", "mlp"),
        ),
        optional="encoder_decoder_attention",
        cross="encoder_decoder_attention",
    ),
    BlockTemplate(
        "layernorm_before self_attn layernorm_after mlp",
        (
            before("attn", "self_attn", "layernorm_before", "self_attn.o_proj|self_attn.out_proj"),
            before("mlp", "mlp", "layernorm_after"),
        ),
    ),
    BlockTemplate(
        "attention_norm attention ffn_norm feed_forward",
        (
            before("attn", "attention", "attention_norm", "attention.o_proj"),
            before("mlp", "feed_forward", "ffn_norm"),
        ),
    ),
    BlockTemplate(
        "rms_norm1 attention rms_norm2 ffn",
        (before("attn", "attention", "rms_norm1", "attention.out_proj"), before("mlp", "ffn", "rms_norm2")),
    ),
    BlockTemplate(
        "attention layer_norm feed_forward final_layer_norm",
        (
            behind("attn", "attention", "layer_norm", "attention.out_proj"),
            behind("mlp", "feed_forward", "final_layer_norm"),
        ),
    ),
    BlockTemplate(
        "attention layer_norm feed_forward final_layer_norm",
        (
            before("attn", "attention", "layer_norm", "attention.out_proj"),
            before("mlp", "feed_forward", "final_layer_norm"),
        ),
    ),
    BlockTemplate(
        "layernorm_before attention layernorm_after intermediate.dense output.dense",
        (
            _attention("attention", "layernorm_before"),
            Output("mlp", "output.dropout|output.dense", residual="layernorm_after", norm_in="layernorm_after"),
        ),
        optional="intermediate output drop_path",
        order="layernorm_before attention layernorm_after intermediate output",
        when=lambda block: getattr(block, "window_size", None) is None,
    ),
    BlockTemplate(  # cut into windows within the block
        "layernorm_before attention layernorm_after intermediate.dense output.dense",
        (
            Output("attn", "drop_path", residual="layernorm_before", norm_in="layernorm_before"),
            Output("mlp", "output.dropout|output.dense", residual="layernorm_after", norm_in="layernorm_after"),
        ),
        optional="intermediate output drop_path",
        order="layernorm_before attention drop_path layernorm_after intermediate output",
        when=lambda block: getattr(block, "window_size", None) is not None,
    ),
    BlockTemplate(  # X + norm(sublayer(x)), cut into windows before the attention
        "layernorm_before attention layernorm_after intermediate.dense output.dense",
        (
            Output("attn", "layernorm_before", residual="", width="layernorm_before"),
            Output("mlp", "layernorm_after", residual="intermediate", width="layernorm_after"),
        ),
        optional="intermediate output drop_path",
        order="attention layernorm_before intermediate output layernorm_after",
    ),
    BlockTemplate(
        "layer_norm_1 attention layer_norm_2 mlp",
        (
            before("attn", "attention", "layer_norm_1", "attention.output.dropout|attention.proj_drop|attention.proj"),
            before("mlp", "mlp", "layer_norm_2"),
        ),
        optional="drop_path",
    ),
    BlockTemplate(
        "layernorm_before attn layernorm_after mlp",
        (before("attn", "attn", "layernorm_before", "attn.proj"), before("mlp", "mlp", "layernorm_after")),
    ),
    BlockTemplate(
        "attention.self.layernorm1 attention.output.dense layernorm mlp",
        (
            before("attn", "attention", "attention.self.layernorm1", "attention.output.dense"),
            before("mlp", "mlp", "layernorm"),
        ),
        optional="attention",
        when=lambda block: getattr(block.attention, "use_query_residual", False) is True,
    ),
    BlockTemplate(
        "module.queries_keys_values",
        (Output("attn", "module", residual="module", width="module.queries_keys_values.linear"),),
        optional="module",
    ),
    BlockTemplate(
        "module.linear_up module.linear_down",
        (Output("mlp", "module", residual="module", width="module.linear_up.linear"),),
        optional="module",
    ),
)
"""All that match and whose order holds must be one, or say nothing of a block."""
