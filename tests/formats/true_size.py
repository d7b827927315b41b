"""Models of true size without values, for what files call their modules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from adapterkit.torchvision_ops import ensure_torchvision_ops

ensure_torchvision_ops()


def clip(width: int, layers: int, heads: int, projecting: bool = False) -> nn.Module:
    """A text encoder of CLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projecting else CLIPTextModel)(config)


def unet(**changes: Any) -> nn.Module:
    """The UNet of Stable Diffusion 1.5, but for what is said."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64, **changes})


def pipeline(name: str) -> SimpleNamespace:
    """The trainable models of a pipeline: sd15, sdxl or flux."""
    with torch.device("meta"):
        return SimpleNamespace(components=_MODELS[name]())


def _sd15() -> dict[str, nn.Module]:
    return {"unet": unet(), "text_encoder": clip(768, 12, 12)}


def _sdxl() -> dict[str, nn.Module]:
    xl = unet(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        use_linear_projection=True,
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return {"unet": xl, "text_encoder": clip(768, 12, 12), "text_encoder_2": clip(1280, 32, 20, projecting=True)}


def _flux() -> dict[str, nn.Module]:
    from diffusers import FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    return {
        "transformer": FluxTransformer2DModel(guidance_embeds=True),
        "text_encoder": clip(768, 12, 12),
        "text_encoder_2": T5EncoderModel(t5),
    }


_MODELS = {"sd15": _sd15, "sdxl": _sdxl, "flux": _flux}
