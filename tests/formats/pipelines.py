"""Tiny pipelines of diffusers with everything that a file of the UIs can be about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import adapterkit as ak


def _frozen(model: nn.Module) -> Any:
    return model.requires_grad_(False).eval()


def clip(width: int, cls: Any = CLIPTextModel) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(**sizes, vocab_size=20, projection_dim=10, bos_token_id=18, eos_token_id=19, pad_token_id=1)
    return _frozen(cls(config))


def unet(**options: Any) -> UNet2DConditionModel:
    sizes = {"layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2, "cross_attention_dim": 8}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (4, 8)}
    more = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 8}
    return _frozen(UNet2DConditionModel(**{**sizes, **blocks, **more, **options}))


def xl() -> UNet2DConditionModel:
    return unet(
        layers_per_block=2,
        block_out_channels=(4, 4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        cross_attention_dim=20,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
    )


def sd1() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    none = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    return StableDiffusionPipeline(
        unet=unet(),
        text_encoder=clip(8),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        requires_safety_checker=False,
        **none,
    )


def sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    none = dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "feature_extractor", "image_encoder"))
    two = {"text_encoder": clip(8), "text_encoder_2": clip(12, CLIPTextModelWithProjection)}
    return StableDiffusionXLPipeline(
        unet=xl(), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), **two, **none
    )


PIPELINES: dict[str, Callable[[], Any]] = {"sd1": sd1, "sdxl": sdxl}


@torch.no_grad()
def run(pipe: Any) -> dict[str, Tensor]:
    """What each model makes of fixed inputs."""
    noise = torch.Generator().manual_seed(5)
    ids = torch.tensor([[18, 3, 4, 5, 6, 19]])
    found: dict[str, Tensor] = {}
    for name in ("text_encoder", "text_encoder_2"):
        if (encoder := pipe.components.get(name)) is not None:
            found[name] = encoder(ids)[0]
            found[f"{name} hidden"] = encoder(ids, output_hidden_states=True).hidden_states[-1]
    latents = torch.randn(1, 4, 8, 8, generator=noise)
    text = torch.randn(1, 6, pipe.unet.config.cross_attention_dim, generator=noise)
    more = {"text_embeds": torch.randn(1, 10, generator=noise), "time_ids": torch.arange(6.0)[None]}
    found["unet"] = pipe.unet(latents, torch.tensor([10]), text, added_cond_kwargs=more).sample
    return found


def randomise(adapters: ak.Adapters, seed: int = 1) -> None:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(std=0.2, generator=noise)


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    return {k: ((one[k] - other[k]).abs().max() / other[k].abs().max()).item() for k in one}
