"""Tiny diffusion transformers and companions of diffusers, and one evaluation of each on fixed inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn

TEXT, POOLED, CHANNELS = 12, 10, 4
"""Widths of the text's tokens and of the pooled text, and channels of the latents."""


def frozen(model: nn.Module) -> Any:
    """Without zeros that hide what comes before (ControlNet's), and frozen before it is looked at.

    Torch picks another kernel where a weight requires grad, with or without adapterkit; see frozen_xl in
    test_diffusion.py.
    """
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if not parameter.is_meta and not parameter.any():
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.requires_grad_(False).eval()


def sd3(**options: Any) -> SD3Transformer2DModel:
    """The layout of Stable Diffusion 3.5: the first block has a second attention, the last one drops the text."""
    sizes = {"sample_size": 8, "in_channels": CHANNELS, "out_channels": CHANNELS, "pos_embed_max_size": 8}
    heads = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    text = {"joint_attention_dim": TEXT, "pooled_projection_dim": POOLED}
    kind = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    return frozen(SD3Transformer2DModel(**{**sizes, **heads, **text, **kind, **options}))


def flux(**options: Any) -> FluxTransformer2DModel:
    """The layout of Flux dev, which knows its guidance; two blocks of either sort."""
    heads = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    text = {"joint_attention_dim": TEXT, "pooled_projection_dim": POOLED, "guidance_embeds": True}
    return frozen(
        FluxTransformer2DModel(**{"in_channels": CHANNELS, "axes_dims_rope": (2, 2, 4), **heads, **text, **options})
    )


def pixart(**options: Any) -> PixArtTransformer2DModel:
    """The layout of PixArt-alpha at 1024 pixels, which knows the image's size and ratio."""
    sizes = {"sample_size": 8, "in_channels": CHANNELS, "out_channels": CHANNELS, "use_additional_conditions": True}
    heads = {"num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2, "cross_attention_dim": 24}
    return frozen(PixArtTransformer2DModel(**{**sizes, **heads, "caption_channels": TEXT, **options}))


def sana(**options: Any) -> SanaTransformer2DModel:
    """The layout of Sana: linear self-attention, a feed-forward of convolutions."""
    sizes = {"sample_size": 4, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    return frozen(SanaTransformer2DModel(**{**sizes, **heads, **cross, "caption_channels": TEXT, **options}))


def controlnet(**options: Any) -> ControlNetModel:
    """The layout of Stable Diffusion 1.5's."""
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": TEXT}
    condition = {"conditioning_embedding_out_channels": (4, 6)}
    return frozen(ControlNetModel(**{**sizes, **blocks, **condition, **options}))


def sd3_controlnet(**options: Any) -> SD3ControlNetModel:
    """The layout of Stable Diffusion 3.5's."""
    sizes = {"sample_size": 8, "in_channels": CHANNELS, "out_channels": CHANNELS, "pos_embed_max_size": 8}
    heads = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    text = {"joint_attention_dim": TEXT, "pooled_projection_dim": POOLED}
    return frozen(SD3ControlNetModel(**{**sizes, **heads, **text, "qk_norm": "rms_norm", **options}))


def flux_controlnet(**options: Any) -> FluxControlNetModel:
    """The layout of one for several modes, which are tokens in front of the text."""
    heads = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    text = {"joint_attention_dim": TEXT, "pooled_projection_dim": POOLED, "num_mode": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of diffusers to itself: it imports from an old place
        made = FluxControlNetModel(in_channels=CHANNELS, axes_dims_rope=(2, 2, 4), **{**heads, **text, **options})
    return frozen(made)


def autoencoder(**options: Any) -> AutoencoderKL:
    """The layout of Stable Diffusion's."""
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 4, "latent_channels": CHANNELS, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return frozen(AutoencoderKL(**{**sizes, **blocks, **options}))


FAMILIES: dict[str, Callable[..., Any]] = {
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
    "controlnet": controlnet,
    "sd3_controlnet": sd3_controlnet,
    "flux_controlnet": flux_controlnet,
    "autoencoder": autoencoder,
}


def run(model: Any) -> Tensor:
    """One evaluation on fixed inputs of the model's dtype; several outputs come out in one row."""
    generator, dtype = torch.Generator().manual_seed(8), model.dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    text, pooled, time, latents = noise(2, 5, TEXT), noise(2, POOLED), torch.tensor([3, 400]), noise(2, CHANNELS, 4, 4)

    def row(*parts: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    places = torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3], dim=1)
    match type(model).__name__:
        case "SD3Transformer2DModel":
            return model(latents, text, pooled, time).sample
        case "FluxTransformer2DModel":
            guidance = torch.tensor([3.5, 1.0]).to(dtype)
            return model(noise(2, 6, CHANNELS), text, pooled, time / 1000, places, torch.zeros(5, 3), guidance).sample
        case "PixArtTransformer2DModel":
            sizes = {"resolution": torch.tensor([[8.0, 8.0]] * 2), "aspect_ratio": torch.tensor([[1.0]] * 2)}
            mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
            return model(latents, text, time, sizes, encoder_attention_mask=mask).sample
        case "SanaTransformer2DModel":
            mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
            return model(latents, text, time, encoder_attention_mask=mask).sample
        case "ControlNetModel":
            outputs = model(noise(2, 4, 8, 8), time, text, noise(2, 3, 16, 16))
            return row(*outputs.down_block_res_samples, outputs.mid_block_res_sample)
        case "SD3ControlNetModel":
            return row(*model(latents, noise(2, CHANNELS, 4, 4), 1.0, text, pooled, time).controlnet_block_samples)
        case "FluxControlNetModel":
            tokens, condition, mode = noise(2, 6, CHANNELS), noise(2, 6, CHANNELS), torch.tensor([[1], [2]])
            outputs = model(tokens, condition, mode, 1.0, text, pooled, time / 1000, places, torch.zeros(5, 3))
            return row(*outputs.controlnet_block_samples, *outputs.controlnet_single_block_samples)
        case _:
            image = noise(2, 3, 16, 16)
            return row(model(image).sample, model.encode(image).latent_dist.mode())
