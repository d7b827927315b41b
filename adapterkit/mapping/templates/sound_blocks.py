"""Blocks of models that hear, by the children that they have: conformers, and decoders of what was heard."""

from __future__ import annotations

from adapterkit.mapping.templates.blocks import around, before, block, sandwich
from adapterkit.mapping.templates.template import BlockTemplate

_OUT = "self_attn.o_proj|self_attn.linear_out|self_attn.out_proj|self_attn.dense"

SOUND_BLOCKS: tuple[BlockTemplate, ...] = (
    block(  # Parakeet and its kin: half of each feed-forward is added
        before("mlp", "feed_forward1", "norm_feed_forward1"),
        before("attn", "self_attn", "norm_self_att", _OUT),
        before("conv", "conv", "norm_conv"),
        before("mlp", "feed_forward2", "norm_feed_forward2"),
        also="norm_out",
    ),
    block(  # Wav2Vec2's conformer: the convolution has its norm inside
        before("mlp", "ffn1", "ffn1_layer_norm"),
        before("attn", "self_attn", "self_attn_layer_norm", f"self_attn_dropout|{_OUT}"),
        before("mlp", "ffn2", "ffn2_layer_norm"),
        also="conv_module final_layer_norm",
        optional="self_attn_dropout",
    ),
    block(  # decoders of Canary and Cohere
        before("attn", "self_attn", "input_layernorm", _OUT),
        before("cross", "encoder_attn", "post_attention_layernorm", "encoder_attn.o_proj|encoder_attn.out_proj"),
        before("mlp", "mlp", "final_layernorm"),
        cross="encoder_attn",
    ),
    # Mimi: each output is scaled channel by channel.
    sandwich("self_attn input_layernorm self_attn_layer_scale", "mlp post_attention_layernorm mlp_layer_scale"),
    # Gemma 4; its feed-forwards add their x inside.
    block(
        around("attn", "norm_pre_attn", "norm_post_attn"),
        also="feed_forward1 self_attn lconv1d feed_forward2 norm_out",
    ),
)
