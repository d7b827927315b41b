"""transformers' other vision models: DINOv2, DINOv3, CLIP, SigLIP, BEiT and Swin, and SigLIP's text encoder.

Paths list the names of transformers 5 first, then those of 4. What a sublayer's output is: its last module before the
sum that is the sublayer's own (dropout and stochastic depth are one module for both sublayers, and follow an adapter).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from adapterkit.backends.longer import longer_blocks, longer_rotary_blocks
from adapterkit.backends.transformers_family import Family, FamilyBackend, stacked
from adapterkit.mapping.family import Fused, Group, Tokens, Weight
from adapterkit.mapping.templates.blocks import before
from adapterkit.plugins.classes import SIGLIP_TEXT, VISION

_PATCHES = Weight("embed.patch", "embeddings.patch_embeddings.projection")
# Where the templates say nothing: a packed feed-forward, and sublayers that end in a scale.
_DINO_BLOCK = (
    Fused(("mlp.gate", "mlp.up"), "mlp.weights_in"),
    Weight("mlp.down", "mlp.fc2|mlp.down_proj|mlp.weights_out"),
    before("attn", "layer_scale1", "norm1"),
    before("mlp", "layer_scale2", "norm2"),
)

DINOV2 = Family(
    VISION["dinov2"],
    stacked(
        "dinov2 dinov2_with_registers",
        (_PATCHES, Tokens("tokens", "embeddings", True)),
        "encoder.layer.{layer}",
        (Weight("head", "classifier"),),
        *_DINO_BLOCK,
    ),
    lengthening=longer_blocks,
    beside="encoder",
)

# Rotary positions are made for the patches, which are the last: nothing can be put behind them.
DINOV3 = Family(
    VISION["dinov3"],
    stacked(
        "",
        (Weight("embed.patch", "embeddings.patch_embeddings"), Tokens("tokens", "embeddings")),
        "model.layer.{layer}|layer.{layer}",
        (),
        *_DINO_BLOCK,
    ),
    lengthening=longer_rotary_blocks,
    beside="model",
)

# Each sublayer's output is scaled by a parameter of the block (`lambda_1`, `lambda_2`) on its way to the sum, where no
# module can be wrapped: what an adapter adds is scaled along. Relative positions fix the number of tokens.
BEIT = Family(
    VISION["beit"],
    stacked(
        "beit",
        (_PATCHES, Tokens("tokens", "embeddings")),
        "layers.{layer}|encoder.layer.{layer}",
        (Weight("head", "classifier|lm_head"),),
        before("attn", "attention", "layernorm_before"),
        before("mlp", "mlp|output", "layernorm_after"),
    ),
)

# Stochastic depth is used once here, after the windows have been put together again.
SWIN = Family(
    VISION["swin"],
    (
        *stacked(
            "swin",
            (_PATCHES,),
            "encoder.layers.{stage}.blocks.{layer}",
            (Weight("head", "classifier|decoder.0"),),
            before("attn", "drop_path", "layernorm_before"),
            before("mlp", "mlp|output", "layernorm_after"),
            site="{stage}.{layer}",
        ),
        Group(
            "swin.encoder.layers.{stage}.downsample|encoder.layers.{stage}.downsample",
            "{stage}",
            (Weight("down.proj", "reduction"),),
        ),
    ),
)

_CLIP_BLOCKS = "encoder.layers.{layer}"
_IMAGE = (Weight("embed.patch", "embeddings.patch_embedding"), Weight("embed.pos", "embeddings.position_embedding"))
TEXT = (
    Weight("embed.tokens", "embeddings.token_embedding"),
    Weight("embed.pos", "embeddings.position_embedding"),
    Tokens("tokens", "embeddings.token_embedding"),
)

CLIP_VISION = Family(
    VISION["clip"],
    stacked(
        "vision_model",
        (*_IMAGE, Tokens("tokens", "pre_layrnorm", True)),
        _CLIP_BLOCKS,
        (Weight("head", "visual_projection|classifier"),),
    ),
    lengthening=longer_blocks,
    beside="encoder",
)

SIGLIP_VISION = Family(
    VISION["siglip"],
    stacked(
        "vision_model",
        (
            *_IMAGE,
            Tokens("tokens", "embeddings", True),
            Weight("head.up", "head.mlp.fc1"),
            Weight("head.down", "head.mlp.fc2"),
        ),
        _CLIP_BLOCKS,
        (Weight("head", "classifier"),),
    ),
    lengthening=longer_blocks,
    beside="encoder",
)

SIGLIP_TEXT = Family(
    SIGLIP_TEXT["siglip_text"], stacked("text_model", (*TEXT, Weight("head", "head")), _CLIP_BLOCKS, ())
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
