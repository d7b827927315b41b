"""Recipes of UNets and ControlNets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapterkit.testing.specimens.diffusers_inputs import FRAMES, ROWS, SIDE, TEXT, TEXT_WIDTH, noise, value, whole
from adapterkit.testing.specimens.diffusers_recipe import (
    HUNYUAN_CONFIG,
    HUNYUAN_INPUTS,
    SEEN,
    SHAPES,
    TIMES,
    TOKENS,
    Recipe,
    listed,
)

_STAGES = {"block_out_channels": (16, 32), "layers_per_block": 1, "attention_head_dim": 2, "norm_num_groups": 4}
_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
_HINT: dict[str, Any] = {"conditioning_embedding_out_channels": (4, 6)}
_control = noise(ROWS, "conditioning_channels", 2 * SIDE, 2 * SIDE)


def _unet(down: tuple[str, str], up: tuple[str, str] | None = None, *without: str, **others: Any) -> dict[str, Any]:
    """Two stages of every kind."""
    blocks = {"down_block_types": down, **({"up_block_types": up} if up else {})}
    stages = {name: size for name, size in _STAGES.items() if name not in without}
    return {**stages, **blocks, **others}


UNETS: Mapping[str, Recipe] = {
    "HunyuanDiT2DControlNetModel": Recipe(
        {**HUNYUAN_CONFIG, "transformer_num_layers": 4},
        {**HUNYUAN_INPUTS, "controlnet_cond": noise(ROWS, "in_channels", SIDE, SIDE)},
        "image",
    ),
    "ControlNetUnionModel": Recipe(
        _unet(
            _DOWN,
            addition_time_embed_dim=16,
            num_trans_channel=16,
            num_trans_head=2,
            num_proj_channel=16,
            **_HINT,
        ),
        {
            "controlnet_cond": listed(_control, 1),
            "control_type": value(torch.tensor([[1.0, 0, 0, 0, 0, 0]] * ROWS, dtype=torch.float64)),
            "control_type_idx": value([0]),
        },
        "image",
    ),
    "UNetControlNetXSModel": Recipe(
        {
            "block_out_channels": (16, 32),
            "ctrl_block_out_channels": (8, 16),
            "ctrl_conditioning_embedding_out_channels": (4, 6),
            "down_block_types": _DOWN,
            "up_block_types": _UP,
            "ctrl_max_norm_num_groups": 4,
            "norm_num_groups": 4,
        },
        {"sample": noise(ROWS, 4, SIDE, SIDE), "controlnet_cond": noise(ROWS, 3, 2 * SIDE, 2 * SIDE)},
    ),
    "CosmosControlNetModel": Recipe(
        {"n_controlnet_blocks": 2, "max_size": (8, 16, 16), "in_channels": 130},
        {
            "controls_latents": noise(ROWS, 128, FRAMES, SIDE, SIDE),
            "latents": noise(ROWS, 16, FRAMES, SIDE, SIDE),
            "condition_mask": value(torch.ones(ROWS, 1, FRAMES, SIDE, SIDE, dtype=torch.float64)),
            "padding_mask": value(torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)),
        },
    ),
    "QwenImageControlNetModel": Recipe(
        {}, {"img_shapes": SHAPES, "controlnet_cond": noise(ROWS, TOKENS, "in_channels")}, "tokens"
    ),
    "SanaControlNetModel": Recipe({}, {"controlnet_cond": noise(ROWS, "in_channels", SIDE, SIDE)}, "image"),
    "FluxControlNetModel": Recipe({}, {"controlnet_cond": noise(ROWS, TOKENS, "in_channels")}, "tokens"),
    "SD3ControlNetModel": Recipe({}, {"controlnet_cond": noise(ROWS, "in_channels", SIDE, SIDE)}, "image"),
    "ControlNetModel": Recipe(_unet(_DOWN, **_HINT), {"controlnet_cond": _control}, "image"),
    "SparseControlNetModel": Recipe(
        _unet(("CrossAttnDownBlockMotion", "DownBlockMotion"), **_HINT),
        {
            "controlnet_cond": noise(ROWS, "conditioning_channels", FRAMES, SIDE, SIDE),
            "encoder_hidden_states": noise(ROWS * FRAMES, TEXT, TEXT_WIDTH),
            "conditioning_mask": noise(ROWS, 1, FRAMES, SIDE, SIDE),
        },
        "video",
    ),
    "UNet1DModel": Recipe(
        {"extra_in_channels": 64}, {"sample": noise(ROWS, "in_channels", 64)}
    ),  # its default cannot run
    "UNet2DModel": Recipe(
        _unet(("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8), layout="image"
    ),
    "UNet2DConditionModel": Recipe(_unet(_DOWN, _UP), layout="image"),
    "UNet3DConditionModel": Recipe(
        _unet(("CrossAttnDownBlock3D", "DownBlock3D"), ("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=8),
        layout="video",
    ),
    "I2VGenXLUNet": Recipe(
        _unet(("CrossAttnDownBlock3D", "DownBlock3D"), ("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=8),
        {
            "image_latents": noise(ROWS, "in_channels", FRAMES, SIDE, SIDE),
            "image_embeddings": noise(ROWS, "cross_attention_dim"),
            "fps": value(torch.tensor([8, 8])),
        },
        "video",
    ),
    "UNetMotionModel": Recipe(
        _unet(
            ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "attention_head_dim",
        ),
        {"encoder_hidden_states": noise(ROWS * FRAMES, TEXT, TEXT_WIDTH)},
        "video",
    ),
    "MotionAdapter": Recipe(
        {
            "block_out_channels": (16, 32),
            "motion_layers_per_block": 1,
            "motion_num_attention_heads": 2,
            "motion_norm_num_groups": 4,
        }
    ),
    "UNetSpatioTemporalConditionModel": Recipe(
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "num_attention_heads": (2, 4),
            "num_frames": FRAMES,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        {"encoder_hidden_states": noise(ROWS, 1, "cross_attention_dim")},
        "frames",
    ),
    "DreamLiteUNetModel": Recipe(
        _unet(
            ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            ("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
            attention_head_dim=16,
        ),
        layout="image",
    ),
    "Kandinsky3UNet": Recipe(
        {"block_out_channels": (16, 32), "layers_per_block": 2, "time_embedding_dim": 64, "attention_head_dim": 8},
        {"encoder_attention_mask": SEEN},
        "image",
    ),
    "StableCascadeUNet": Recipe(
        {
            "block_out_channels": (32, 64),
            "num_attention_heads": (2, 4),
            "down_num_layers_per_block": (1, 2),
            "up_num_layers_per_block": (2, 1),
        },
        {
            "timestep_ratio": TIMES,
            "clip_text_pooled": noise(ROWS, 1, "clip_text_pooled_in_channels"),
        },
        "image",
    ),
    "UVit2DModel": Recipe(
        {
            "sample_size": 4,
            "in_channels": 32,
            "block_out_channels": 32,
            "codebook_size": 60,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
        },
        {
            "input_ids": whole("vocab_size", ROWS, 4, 4),
            "pooled_text_emb": noise(ROWS, "cond_embed_dim"),
            "micro_conds": noise(ROWS, 5),
        },
    ),
}
