"""Blocks of encoders of text that are arranged in their own way: narrow ones, adapters of languages, channels."""

from __future__ import annotations

from adapterkit.mapping.entries import Output, Weight
from adapterkit.mapping.templates.blocks import before
from adapterkit.mapping.templates.template import BlockTemplate


def _channels(role: str, sublayer: str, residual: str) -> Output:
    """A convolution over channels at dimension 1, a dropout, and the norm of the sum."""
    conv, norm = f"{sublayer}.conv1d", f"{sublayer}.layernorm"
    return Output(role, f"{sublayer}.dropout", residual=residual, norm_out=norm, convolved=conv)


_NARROW = Output("mlp", "output.dense", residual="intermediate", norm_out="output.LayerNorm")

ENCODER_BLOCKS: tuple[BlockTemplate, ...] = (
    BlockTemplate(  # NeoMME, whose attention sees the stream mixed with the embeddings, and is added to the stream
        "input_layernorm self_attn post_attention_layernorm mlp",
        (before("mlp", "mlp", "post_attention_layernorm"),),
        names="lambdas",
    ),
    BlockTemplate(  # MobileBERT; what its attention is added to comes out of a bottleneck, and enters nothing else
        "attention.output.dense intermediate.dense output.dense output.LayerNorm output.bottleneck",
        (_NARROW,),
        optional="attention intermediate output bottleneck ffn",
        whole=False,  # the stream between blocks is wider
    ),
    BlockTemplate("intermediate.dense output.dense output.LayerNorm", (_NARROW,), optional="intermediate output"),
    BlockTemplate(  # X-MOD, whose last norm stands behind the adapters of languages
        "attention.output.LayerNorm intermediate.dense output.adapter_modules output.LayerNorm",
        (
            Output(
                "attn",
                "attention.output.dropout|attention.output.dense",
                residual="attention",
                norm_out="attention.output.LayerNorm",
            ),
            Output("mlp", "output.dense", residual="intermediate"),
        ),
        optional="crossattention attention intermediate output",
        cross="crossattention",
        when=lambda block: block.pre_norm is False,
        branches=True,
    ),
    BlockTemplate(  # SqueezeBERT
        "attention.query post_attention.conv1d post_attention.layernorm intermediate.conv1d output.conv1d "
        "output.layernorm",
        (
            Weight("attn.o", "post_attention.conv1d"),
            _channels("attn", "post_attention", "attention"),
            Weight("mlp.up", "intermediate.conv1d"),
            Weight("mlp.down", "output.conv1d"),
            _channels("mlp", "output", "intermediate"),
        ),
        optional="attention post_attention intermediate output",
        whole=False,  # it gives a dictionary
    ),
)
"""All that match and whose order holds must be one, or say nothing of a block."""
