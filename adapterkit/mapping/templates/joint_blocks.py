"""Blocks of diffusion models whose sublayers give two streams at once, or stand in an order of their own.

Where one module gives image and text as a pair, an adapter at its output acts on what comes first, the image; where a
feed-forward is called for each stream, or for both in one sequence, its output is added to no x that a module sees.
"""

from __future__ import annotations

from adapterkit.mapping.entries import Output, Weight
from adapterkit.mapping.templates.template import BlockTemplate

_PAIR = Output("attn", "attn1", residual="norm1", width="attn1.to_q")


def _film(role: str, place: int) -> Output:
    """A layer of a list, with a norm that is modulated behind it."""
    norm = f"layer.{place}.layer_norm"
    return Output(role, f"layer.{place}.dropout", residual=norm, norm_in=norm)


JOINT_BLOCKS: tuple[BlockTemplate, ...] = (
    BlockTemplate(  # CogVideoX
        "norm1.linear norm1.norm attn1 norm2.linear norm2.norm ff",
        (_PAIR,),
        optional="norm1 norm2 norm3",
        whole=False,
    ),
    BlockTemplate(  # EasyAnimate
        "norm1.linear norm1.norm attn1 norm2.linear norm2.norm ff txt_ff",
        streams={"img": (_PAIR, Output("mlp", "ff", residual="norm2", width="attn1.to_q"))},
        without="norm3",
        optional="norm1 norm2",
        whole=False,
    ),
    BlockTemplate(  # CogView 3 plus and 4, GLM-Image
        "norm1.linear norm1.norm|norm1.norm_x attn1 norm2 norm2_context ff",
        (_PAIR,),
        optional="norm1",
        whole=False,
    ),
    BlockTemplate(  # Lumina-Next, which projects the sum of both attentions
        "norm1 attn1 attn2 norm2 ffn_norm1 feed_forward ffn_norm2 norm1_context",
        (
            Output("attn", "norm2", residual="norm1", norm_in="norm1.norm"),
            Output("mlp", "ffn_norm2", residual="ffn_norm1", norm_in="ffn_norm1"),
        ),
        cross="attn2",
    ),
    BlockTemplate(  # the decoder of T5 that is modulated
        "layer.0.attention layer.0.FiLMLayer layer.1.attention layer.2.DenseReluDense layer.2.film",
        (
            _film("attn", 0),
            _film("cross", 1),
            _film("mlp", 2),
        ),
        optional="layer",
        cross="1",
    ),
    BlockTemplate(  # Kandinsky 3, whose attention takes its image apart and puts it together
        "in_norm attention out_norm feed_forward.0 feed_forward.2",
        (
            Weight("mlp.up", "feed_forward.0"),
            Weight("mlp.down", "feed_forward.2"),
            Output("mlp", "feed_forward", residual="out_norm", width="feed_forward.0", convolved="feed_forward"),
        ),
        optional="feed_forward",
        whole=False,
    ),
)
"""All that match and whose order holds must be one, or say nothing of a block."""
