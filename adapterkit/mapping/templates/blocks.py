"""Blocks by the children that they have: where the residual stream enters and leaves their sublayers.

Of templates for the same children, those hold whose norms stand before or behind their sublayers as in the block's
forward.
"""

from __future__ import annotations

from adapterkit.mapping.entries import Output
from adapterkit.mapping.templates.template import BlockTemplate


def before(role: str, sublayer: str, norm: str, last: str = "") -> Output:
    """Gives x + sublayer(norm(x)). `last` are alternatives for the module whose output is the sublayer's."""
    return Output(role, f"{last}|{sublayer}" if last else sublayer, residual=norm, norm_in=norm, width=sublayer)


def behind(role: str, sublayer: str, norm: str, last: str = "") -> Output:
    """norm(x + sublayer(x))."""
    return Output(role, f"{last}|{sublayer}" if last else sublayer, residual=sublayer, norm_out=norm, width=sublayer)


def around(role: str, norm_in: str, norm_out: str) -> Output:
    """Gives x + norm_out(sublayer(norm_in(x)))."""
    return Output(role, norm_out, residual=norm_in, norm_in=norm_in)


def after(role: str, sublayer: str, norm: str) -> Output:
    """Gives x + norm(sublayer(x))."""
    return Output(role, norm, residual=sublayer, width=norm)


_LLAMA_OUT = "self_attn.o_proj|self_attn.out_proj|self_attn.dense"

BLOCKS: tuple[BlockTemplate, ...] = (
    BlockTemplate(
        "input_layernorm self_attn post_attention_layernorm mlp",
        (
            before("attn", "self_attn", "input_layernorm", _LLAMA_OUT),
            before("mlp", "mlp", "post_attention_layernorm", "mlp.down_proj|mlp.fc2"),
        ),
        unless="lambdas",
    ),
    BlockTemplate(
        "input_layernorm self_attn post_attention_layernorm pre_feedforward_layernorm mlp post_feedforward_layernorm",
        (
            around("attn", "input_layernorm", "post_attention_layernorm"),
            around("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
    ),
    BlockTemplate(
        "self_attn post_attention_layernorm mlp post_feedforward_layernorm",
        (
            after("attn", "self_attn", "post_attention_layernorm"),
            after("mlp", "mlp", "post_feedforward_layernorm"),
        ),
    ),
    BlockTemplate(
        "attention.output.LayerNorm intermediate.dense output.LayerNorm",
        (
            behind(
                "attn", "attention", "attention.output.LayerNorm", "attention.output.dropout|attention.output.dense"
            ),
            behind("cross", "crossattention", "crossattention.output.LayerNorm", "crossattention.output.dropout"),
            Output("mlp", "output.dropout|output.dense", residual="intermediate", norm_out="output.LayerNorm"),
        ),
        optional="crossattention attention intermediate output",
        cross="crossattention",
    ),
    BlockTemplate(
        "self_attn_layer_norm self_attn final_layer_norm fc1 fc2",
        (
            before("attn", "self_attn", "self_attn_layer_norm", "self_attn.out_proj"),
            before("cross", "encoder_attn", "encoder_attn_layer_norm", "encoder_attn.out_proj"),
            Output("mlp", "fc2", residual="final_layer_norm", norm_in="final_layer_norm"),
        ),
        optional="encoder_attn encoder_attn_layer_norm",
        cross="encoder_attn",
    ),
    BlockTemplate(
        "self_attn_layer_norm self_attn final_layer_norm fc1 fc2",
        (
            behind("attn", "self_attn", "self_attn_layer_norm", "self_attn.out_proj"),
            behind("cross", "encoder_attn", "encoder_attn_layer_norm", "encoder_attn.out_proj"),
            Output("mlp", "fc2", residual="fc1", norm_out="final_layer_norm"),
        ),
        optional="encoder_attn encoder_attn_layer_norm",
        cross="encoder_attn",
    ),
    BlockTemplate(
        "layer_norm1 self_attn layer_norm2 mlp",
        (
            before("attn", "self_attn", "layer_norm1", "self_attn.out_proj|self_attn.o_proj"),
            before("mlp", "mlp", "layer_norm2", "mlp.fc2|mlp.down_proj"),
        ),
    ),
    BlockTemplate(
        "layernorm_before attention layernorm_after mlp",
        (before("attn", "attention", "layernorm_before"), before("mlp", "mlp", "layernorm_after")),
    ),
)
"""All that match and whose order holds must be one, or say nothing of a block."""
