"""transformers' other vision models: DINOv2, DINOv3, CLIP, SigLIP, BEiT and Swin, and SigLIP's text encoder.

Paths list the names of transformers 5 first, then those of 4. What a sublayer's output is: its last module before the
sum that is the sublayer's own (dropout and stochastic depth are one module for both sublayers, and follow an adapter).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from adapterkit.backends.longer import longer_blocks, longer_rotary_blocks
from adapterkit.backends.transformers_family import Family, FamilyBackend
from adapterkit.mapping.family import Attention, Entry, Fused, Group, Output, Tokens, Weight
from adapterkit.plugins.classes import SIGLIP_TEXT, VISION


def _heads(attention: Any) -> tuple[int, int]:
    """Heads and their width. transformers 4 says `attention_head_size`."""
    heads = attention.num_heads if hasattr(attention, "num_heads") else attention.num_attention_heads
    return int(heads), int(getattr(attention, "head_dim", None) or attention.attention_head_size)


_PROJECTIONS = (
    Weight("attn.q", "attention.q_proj|attention.attention.query|attention.self.query"),
    Weight("attn.k", "attention.k_proj|attention.attention.key|attention.self.key"),
    Weight("attn.v", "attention.v_proj|attention.attention.value|attention.self.value"),
    Weight("attn.o", "attention.o_proj|attention.output.dense"),
    Attention("attn.kv", "attention.attention|attention.self|attention", _heads),
)
_MLP = (
    Fused(("mlp.gate", "mlp.up"), "mlp.weights_in"),
    Weight("mlp.gate", "mlp.gate_proj"),
    Weight("mlp.up", "mlp.fc1|mlp.up_proj|intermediate.dense"),
    Weight("mlp.down", "mlp.fc2|mlp.down_proj|mlp.weights_out|output.dense"),
)
_DINO_BLOCK = (
    *_PROJECTIONS,
    *_MLP,
    Output("attn", "layer_scale1", residual="norm1", norm_in="norm1"),
    Output("mlp", "layer_scale2", residual="norm2", norm_in="norm2"),
)

DINOV2 = Family(
    lengthening=longer_blocks,
    beside="encoder",
    classes=VISION["dinov2"],
    groups=(
        Group(
            "dinov2|dinov2_with_registers|",
            "",
            (Weight("embed.patch", "embeddings.patch_embeddings.projection"), Tokens("tokens", "embeddings", True)),
        ),
        Group(
            "dinov2.encoder.layer.{layer}|dinov2_with_registers.encoder.layer.{layer}|encoder.layer.{layer}",
            "{layer}",
            _DINO_BLOCK,
        ),
        Group("", "", (Weight("head", "classifier"),)),
    ),
)

# Rotary positions are made for the patches, which are the last: nothing can be put behind them.
DINOV3 = Family(
    lengthening=longer_rotary_blocks,
    beside="model",
    classes=VISION["dinov3"],
    groups=(
        Group("", "", (Weight("embed.patch", "embeddings.patch_embeddings"), Tokens("tokens", "embeddings"))),
        Group("model.layer.{layer}|layer.{layer}", "{layer}", _DINO_BLOCK),
    ),
)

# Each sublayer's output is scaled by a parameter of the block (`lambda_1`, `lambda_2`) on its way to the sum, where no
# module can be wrapped: what an adapter adds is scaled along. Relative positions fix the number of tokens.
BEIT = Family(
    classes=VISION["beit"],
    groups=(
        Group(
            "beit|",
            "",
            (Weight("embed.patch", "embeddings.patch_embeddings.projection"), Tokens("tokens", "embeddings")),
        ),
        Group(
            "beit.layers.{layer}|layers.{layer}|beit.encoder.layer.{layer}|encoder.layer.{layer}",
            "{layer}",
            (
                *_PROJECTIONS,
                *_MLP,
                Output("attn", "attention", residual="layernorm_before", norm_in="layernorm_before"),
                Output("mlp", "mlp|output", residual="layernorm_after", norm_in="layernorm_after"),
            ),
        ),
        Group("", "", (Weight("head", "classifier|lm_head"),)),
    ),
)

# Stochastic depth is used once here, after the windows have been put together again.
SWIN = Family(
    classes=VISION["swin"],
    groups=(
        Group("swin|", "", (Weight("embed.patch", "embeddings.patch_embeddings.projection"),)),
        Group(
            "swin.encoder.layers.{stage}.blocks.{layer}|encoder.layers.{stage}.blocks.{layer}",
            "{stage}.{layer}",
            (
                *_PROJECTIONS,
                *_MLP,
                Output("attn", "drop_path", residual="layernorm_before", norm_in="layernorm_before"),
                Output("mlp", "mlp|output", residual="layernorm_after", norm_in="layernorm_after"),
            ),
        ),
        Group(
            "swin.encoder.layers.{stage}.downsample|encoder.layers.{stage}.downsample",
            "{stage}",
            (Weight("down.proj", "reduction"),),
        ),
        Group("", "", (Weight("head", "classifier|decoder.0"),)),
    ),
)

_CLIP_BLOCK: tuple[Entry, ...] = (
    Weight("attn.q", "self_attn.q_proj"),
    Weight("attn.k", "self_attn.k_proj"),
    Weight("attn.v", "self_attn.v_proj"),
    Weight("attn.o", "self_attn.out_proj"),
    Attention("attn.kv", "self_attn", _heads),
    Output("attn", "self_attn.out_proj", residual="layer_norm1", norm_in="layer_norm1"),
    Weight("mlp.up", "mlp.fc1"),
    Weight("mlp.down", "mlp.fc2"),
    Output("mlp", "mlp.fc2", residual="layer_norm2", norm_in="layer_norm2"),
)


def _clip(tower: str, embeddings: tuple[Entry, ...]) -> tuple[Group, ...]:
    return (
        Group(f"{tower}.embeddings|embeddings", "", embeddings),
        Group(f"{tower}.encoder.layers.{{layer}}|encoder.layers.{{layer}}", "{layer}", _CLIP_BLOCK),
    )


_IMAGE = (Weight("embed.patch", "patch_embedding"), Weight("embed.pos", "position_embedding"))

CLIP_VISION = Family(
    lengthening=longer_blocks,
    beside="encoder",
    classes=VISION["clip"],
    groups=(
        *_clip("vision_model", _IMAGE),
        Group("vision_model|", "", (Tokens("tokens", "pre_layrnorm", True),)),
        Group("", "", (Weight("head", "visual_projection|classifier"),)),
    ),
)

SIGLIP_VISION = Family(
    lengthening=longer_blocks,
    beside="encoder",
    classes=VISION["siglip"],
    groups=(
        *_clip("vision_model", (*_IMAGE, Tokens("tokens", "", True))),
        Group("vision_model.head|head", "", (Weight("head.up", "mlp.fc1"), Weight("head.down", "mlp.fc2"))),
        Group("", "", (Weight("head", "classifier"),)),
    ),
)

SIGLIP_TEXT = Family(
    classes=SIGLIP_TEXT["siglip_text"],
    groups=(
        *_clip(
            "text_model",
            (
                Weight("embed.tokens", "token_embedding"),
                Weight("embed.pos", "position_embedding"),
                Tokens("tokens", "token_embedding"),
            ),
        ),
        Group("text_model|", "", (Weight("head", "head"),)),
    ),
)


class VisionBackend(FamilyBackend):
    """DINOv2, DINOv3, CLIP's and SigLIP's image encoders, BEiT and Swin, with any of their heads or none."""

    component = "vision"
    name = "vision"
    families = (DINOV2, DINOV3, BEIT, SWIN, CLIP_VISION, SIGLIP_VISION, SIGLIP_TEXT)
    ignored: ClassVar[Mapping[str, str]] = {
        "*head.attention.out_proj": "SigLIP pools with torch's MultiheadAttention, a head that no preset would reach",
        "fpn.*": "a segmentation head, which is trained whole",
        "decode_head.*": "a segmentation head, as above",
        "auxiliary_head.*": "a segmentation head, as above",
    }


class SiglipTextBackend(VisionBackend):
    """SigLIP's text encoder."""

    component = "text_encoder"
