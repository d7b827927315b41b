"""Blocks of diffusion models whose sublayers give two streams at once, or stand in an order of their own.

Where one module gives image and text as a pair, an adapter at its output acts on what comes first, the image; where a
feed-forward is called for each stream, or for both in one sequence, its output is added to no x that a module sees.
"""

from __future__ import annotations

from adapterkit.mapping.entries import Output, Weight
from adapterkit.mapping.templates.blocks import around
from adapterkit.mapping.templates.template import BlockTemplate

_PAIR = Output("attn", "attn1", residual="norm1", width="attn1.to_q")


def _film(role: str, place: int) -> Output:
    """A layer of a list, with a norm that is modulated behind it."""
    norm = f"layer.{place}.layer_norm"
    return Output(role, f"layer.{place}.dropout", residual=norm, norm_in=norm)


_NORMED = "norm1.linear norm1.norm attn1 norm2.linear norm2.norm ff"

JOINT_BLOCKS: tuple[BlockTemplate, ...] = (
    BlockTemplate(_NORMED, (_PAIR,), optional="norm3", whole=False),  # CogVideoX
    BlockTemplate(  # EasyAnimate
        f"{_NORMED} txt_ff",
        streams={"img": (_PAIR, Output("mlp", "ff", residual="norm2", width="attn1.to_q"))},
        without="norm3",
        whole=False,
    ),
    # CogView 3 plus and 4, GLM-Image.
    BlockTemplate("norm1.linear norm1.norm|norm1.norm_x attn1 norm2 norm2_context ff", (_PAIR,), whole=False),
    BlockTemplate(  # Lumina-Next, which projects the sum of both attentions
        "norm1 attn1 attn2 norm2 ffn_norm1 feed_forward ffn_norm2 norm1_context",
        (Output("attn", "norm2", residual="norm1", norm_in="norm1.norm"), around("mlp", "ffn_norm1", "ffn_norm2")),
        cross="attn2",
    ),
    BlockTemplate(  # the decoder of T5 that is modulated
        "layer.0.attention layer.0.FiLMLayer layer.1.attention layer.2.DenseReluDense layer.2.film",
        (_film("attn", 0), _film("cross", 1), _film("mlp", 2)),
        cross="1",
    ),
    BlockTemplate(  # Kandinsky 3, whose attention takes its image apart and puts it together
        "in_norm attention out_norm feed_forward.0 feed_forward.2",
        (
            Weight("mlp.up", "feed_forward.0"),
            Weight("mlp.down", "feed_forward.2"),
            Output("mlp", "feed_forward", residual="out_norm", width="feed_forward.0", convolved="feed_forward"),
        ),
        whole=False,
    ),
)
"""All that match and whose order holds must be one, or say nothing of a block."""
