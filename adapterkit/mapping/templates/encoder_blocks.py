"""Blocks of encoders of text that are arranged in their own way: narrow ones, adapters of languages, channels."""

from __future__ import annotations

from adapterkit.mapping.entries import Output, Weight
from adapterkit.mapping.templates.blocks import before, behind, block, last
from adapterkit.mapping.templates.template import BlockTemplate


def _channels(role: str, sublayer: str, residual: str) -> Output:
    """A convolution over channels at dimension 1, a dropout, and the norm of the sum."""
    conv, norm = f"{sublayer}.conv1d", f"{sublayer}.layernorm"
    return Output(role, f"{sublayer}.dropout", residual=residual, norm_out=norm, convolved=conv)


_NARROW = Output("mlp", "output.dense", residual="intermediate", norm_out="output.LayerNorm")

ENCODER_BLOCKS: tuple[BlockTemplate, ...] = (
    # NeoMME, whose attention sees the stream mixed with the embeddings, and is added to the stream.
    block(before("mlp", "mlp", "post_attention_layernorm"), also="input_layernorm self_attn", names="lambdas"),
    block(  # MobileBERT; what its attention is added to comes out of a bottleneck, and enters nothing else
        _NARROW,
        also="attention.output.dense intermediate.dense output.bottleneck",
        optional="bottleneck ffn",
        whole=False,  # the stream between blocks is wider
    ),
    block(_NARROW, also="intermediate.dense"),
    block(  # X-MOD, whose last norm stands behind the adapters of languages
        behind("attn", "attention", "attention.output.LayerNorm", last("attention.output", "dropout|dense")),
        Output("mlp", "output.dense", residual="intermediate"),
        also="intermediate.dense output.adapter_modules output.LayerNorm",
        optional="crossattention",
        cross="crossattention",
        when=lambda block: block.pre_norm is False,
        branches=True,
    ),
    block(  # SqueezeBERT
        Weight("attn.o", "post_attention.conv1d"),
        _channels("attn", "post_attention", "attention"),
        Weight("mlp.up", "intermediate.conv1d"),
        Weight("mlp.down", "output.conv1d"),
        _channels("mlp", "output", "intermediate"),
        also="attention.query",
        whole=False,  # it gives a dictionary
    ),
)
"""All that match and whose order holds must be one, or say nothing of a block."""
