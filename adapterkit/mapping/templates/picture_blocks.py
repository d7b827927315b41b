"""Blocks, attentions and feed-forwards of transformers' vision and audio encoders, by the children that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adapterkit.mapping.entries import Output
from adapterkit.mapping.templates.attentions import apart, attention
from adapterkit.mapping.templates.blocks import before, block, last, post, pre
from adapterkit.mapping.templates.feed_forwards import plain
from adapterkit.mapping.templates.rows import by_heads, pairs_by_heads, side_by_side
from adapterkit.mapping.templates.template import AttentionTemplate, BlockTemplate, Template
from adapterkit.points import Span


def _one_query(attention: Any, rows: int) -> list[Span]:
    """MobileViT 2: one score a token, then keys and values."""
    wide = (rows - 1) // 2
    return side_by_side(1, wide, wide)


PICTURE_ATTENTIONS: tuple[AttentionTemplate, ...] = (
    # Swin v2: a softmax over cosines, which keys of any length would not change.
    apart(
        "self.query",
        "self.key",
        "self.value",
        "output.dense",
        also="self.continuous_position_bias_mlp.0 output.dense",
        at="self",
        linear=True,
    ),
    # Hiera: units of the mask are a further dimension of its queries, keys and values.
    attention(
        "q+k+v qkv, o proj",
        also="proj",
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
    attention("q+k+v queries_keys_values.linear, o projection.linear", by_heads, "projection.linear"),
    attention("q queries.linear, k+v keys_values.linear, o projection.linear", pairs_by_heads, "projection.linear"),
    attention("q+k+v qkv_proj.convolution, o out_proj.convolution", _one_query, "out_proj.convolution", linear=True),
)
"""The first that matches is a module's."""

PICTURE_FEED_FORWARDS: tuple[Template, ...] = (
    plain("dense1", "dense2"),
    plain("intermediate_dense", "output_dense"),
    plain("linear_up.linear", "linear_down.linear"),
)
"""The first that matches is a module's."""


def _within(role: str, sublayer: str) -> Output:
    """A sublayer that holds its norm and its dropout."""
    return Output(role, f"{sublayer}.dropout", residual=f"{sublayer}.layer_norm", norm_in=f"{sublayer}.layer_norm")


_BEFORE, _AFTER, _END = "layernorm_before", "layernorm_after", "output.dropout|output.dense"


def _windowed(*outputs: Output, order: str, when: Callable[[Any], bool] | None = None) -> BlockTemplate:
    """As ViT; some cut the stream into windows."""
    has = f"{_BEFORE} attention {_AFTER} intermediate.dense output.dense"
    return BlockTemplate(has, outputs, optional="drop_path", order=order, when=when)


PICTURE_BLOCKS: tuple[BlockTemplate, ...] = (
    pre("attention pre_attention_layer_norm", "mlp pre_mlp_layer_norm", "output"),
    pre("self_attn self_attn_layer_norm", "ffn final_layer_norm", "out_proj"),
    block(
        _within("attn", "self_attention"),
        _within("cross", "encoder_decoder_attention"),
        _within("mlp", "mlp"),
        optional="encoder_decoder_attention",
        cross="encoder_decoder_attention",
    ),
    pre(f"self_attn {_BEFORE}", f"mlp {_AFTER}", "o_proj|out_proj"),
    pre("attention attention_norm", "feed_forward ffn_norm", "o_proj"),
    pre("attention rms_norm1", "ffn rms_norm2", "out_proj"),
    post("attention layer_norm", "feed_forward final_layer_norm", "out_proj"),
    pre("attention layer_norm", "feed_forward final_layer_norm", "out_proj"),
    _windowed(
        before("attn", "attention", _BEFORE, last("attention.output", "dropout|dense")),
        Output("mlp", _END, residual=_AFTER, norm_in=_AFTER),
        order=f"{_BEFORE} attention {_AFTER} intermediate output",
        when=lambda block: getattr(block, "window_size", None) is None,
    ),
    _windowed(  # cut within the block
        Output("attn", "drop_path", residual=_BEFORE, norm_in=_BEFORE),
        Output("mlp", _END, residual=_AFTER, norm_in=_AFTER),
        order=f"{_BEFORE} attention drop_path {_AFTER} intermediate output",
        when=lambda block: getattr(block, "window_size", None) is not None,
    ),
    _windowed(  # x + norm(sublayer(x)), cut before the attention
        Output("attn", _BEFORE, residual="", width=_BEFORE),
        Output("mlp", _AFTER, residual="intermediate", width=_AFTER),
        order=f"attention {_BEFORE} intermediate output {_AFTER}",
    ),
    pre("attention layer_norm_1", "mlp layer_norm_2", "output.dropout|proj_drop|proj", optional="drop_path"),
    pre(f"attn {_BEFORE}", f"mlp {_AFTER}", "proj"),
    pre(
        "attention attention.self.layernorm1",
        "mlp layernorm",
        "output.dense",
        also="attention.output.dense",
        when=lambda block: getattr(block.attention, "use_query_residual", False) is True,
    ),
    BlockTemplate(
        "module.queries_keys_values",
        (Output("attn", "module", residual="module", width="module.queries_keys_values.linear"),),
    ),
    BlockTemplate(
        "module.linear_up module.linear_down",
        (Output("mlp", "module", residual="module", width="module.linear_up.linear"),),
    ),
)
"""All that match and whose order holds must be one, or say nothing of a block."""
