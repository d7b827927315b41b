"""Tiny vision and diffusion models, built from configs: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, ViTConfig

WIDTH, HEADS, LAYERS, IMAGE, PATCH, CLASSES = 8, 2, 2, 8, 4, 3
CONTEXT = 12  # width of the text that the UNets attend to
WORDS = ("red", "blue", "one", "two", "circle", "square")


def images(batch: int = 2, channels: int = 3, size: int = IMAGE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(7)).to(dtype)


def timm_vit(cls: type[VisionTransformer] = VisionTransformer, **options: Any) -> VisionTransformer:
    sizes: dict[str, Any] = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS}
    return cls(**{**sizes, "num_heads": HEADS, "num_classes": CLASSES, **options}).eval()


def vit_config(**options: Any) -> ViTConfig:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return ViTConfig(**{**sizes, "intermediate_size": 2 * WIDTH, "image_size": IMAGE, "patch_size": PATCH, **options})


def unet(**options: Any) -> UNet2DConditionModel:
    """The layout of Stable Diffusion 1.5: 1x1 convolutions around the transformers."""
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(
        **{**sizes, **blocks, "cross_attention_dim": CONTEXT, "attention_head_dim": 2, **options}
    ).eval()


def unet_xl(**options: Any) -> UNet2DConditionModel:
    """The layout of Stable Diffusion XL: linear projections, deeper transformers, size and text embeddings."""
    sizes: dict[str, Any] = {
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2, 2),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 4 * 6 + CONTEXT,
    }
    return unet(**{**sizes, **options})


def denoise(model: UNet2DConditionModel, **options: Any) -> Tensor:
    """One evaluation of a UNet on fixed noise and text."""
    dtype = model.dtype
    text = torch.randn(2, 5, CONTEXT, generator=torch.Generator().manual_seed(8)).to(dtype)
    extra = {}
    if model.config.addition_embed_type == "text_time":
        extra = {"added_cond_kwargs": {"text_embeds": text[:, 0], "time_ids": torch.arange(12.0).view(2, 6).to(dtype)}}
    inputs = images(channels=4, dtype=dtype)
    return model(inputs, torch.tensor([3, 400]), text, **extra, **options).sample


def pipeline(folder: Path) -> StableDiffusionPipeline:
    """A whole Stable Diffusion, tokenizer included; `folder` receives the tokenizer's files."""
    parts = {"text_encoder": CLIPTextModel(_text_config()), "tokenizer": _tokenizer(folder), "unet": unet()}
    made = StableDiffusionPipeline(**parts, **_common(), safety_checker=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def pipeline_xl(folder: Path) -> StableDiffusionXLPipeline:
    """A whole Stable Diffusion XL: two text encoders, whose outputs the UNet gets side by side."""
    tokenizer, narrow = _tokenizer(folder), CONTEXT // 2
    made = StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(_text_config(hidden_size=narrow)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(hidden_size=narrow, projection_dim=CONTEXT)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet_xl().requires_grad_(False),  # for bitwise comparisons: see frozen_xl in test_diffusion.py
        add_watermarker=False,
        **_common(),
    )
    made.set_progress_bar_config(disable=True)
    return made


def _text_config(**options: Any) -> CLIPTextConfig:
    last = len(_vocabulary())
    sizes = {"hidden_size": CONTEXT, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"vocab_size": last, "max_position_embeddings": 16, "bos_token_id": last - 2, "eos_token_id": last - 1}
    return CLIPTextConfig(**{**sizes, **special, **options})


def _common() -> dict[str, Any]:
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return {"vae": vae, "scheduler": scheduler, "feature_extractor": None, "image_encoder": None}


def draw(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, prompt: str = "one red circle") -> Tensor:
    """An image [1, height, width, 3] from a fixed seed."""
    generator = torch.Generator().manual_seed(5)
    made = pipe(prompt, num_inference_steps=2, height=16, width=16, generator=generator, output_type="pt")
    return made.images


def _merges() -> list[str]:
    """Byte pairs that make each word one token, letter by letter from the left."""
    pairs: dict[str, None] = {}
    for word in WORDS:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        for count in range(1, len(letters)):
            pairs[f"{''.join(letters[:count])} {letters[count]}"] = None
    return list(pairs)


def _vocabulary() -> dict[str, int]:
    """All visible ASCII bytes alone and at the end of a word, what the merges make, and CLIP's two special tokens."""
    letters = [chr(code) for code in range(33, 127)]
    merged = [pair.replace(" ", "") for pair in _merges()]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _tokenizer(folder: Path) -> CLIPTokenizer:
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "unk_token": "<|endoftext|>", **special}
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_merges()]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


class OldViT(nn.Module):
    """The module names of transformers 4's ViTForImageClassification, with the parts of a given new one."""

    def __init__(self, new: nn.Module) -> None:
        super().__init__()
        old = new.vit
        self.vit = _holder(
            embeddings=old.embeddings,
            encoder=_holder(layer=nn.ModuleList(OldLayer(layer) for layer in old.layers)),
            layernorm=old.layernorm,
        )
        self.classifier = new.classifier

    def forward(self, x: Tensor) -> Tensor:
        x = self.vit.embeddings(x)
        for layer in self.vit.encoder.layer:
            x = layer(x)
        return self.classifier(self.vit.layernorm(x)[:, 0])


class OldLayer(nn.Module):
    def __init__(self, new: nn.Module) -> None:
        super().__init__()
        attention, mlp = new.attention, new.mlp
        self.attention = OldAttention(attention)
        self.intermediate = _holder(dense=mlp.fc1)
        self.output = _holder(dense=mlp.fc2, dropout=nn.Dropout(0.0))
        self.layernorm_before, self.layernorm_after = new.layernorm_before, new.layernorm_after

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))[0]
        hidden = nn.functional.gelu(self.intermediate.dense(self.layernorm_after(x)))
        return x + self.output.dropout(self.output.dense(hidden))


class OldAttention(nn.Module):
    def __init__(self, new: nn.Module) -> None:
        super().__init__()
        self.attention = OldSelfAttention(new)
        self.output = _holder(dense=new.o_proj, dropout=nn.Dropout(0.0))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.output.dropout(self.output.dense(self.attention(x))),)


class OldSelfAttention(nn.Module):
    def __init__(self, new: nn.Module) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = new.num_attention_heads, new.head_dim
        self.query, self.key, self.value = new.q_proj, new.k_proj, new.v_proj

    def forward(self, x: Tensor) -> Tensor:
        parts = (
            layer(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


def _holder(**children: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made
