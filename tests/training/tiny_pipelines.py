"""Tiny pipelines of every family that has a recipe, tokenizers included, built from configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests.backends import diffusion_models, vision_models

TEXT = diffusion_models.TEXT
WORDS = ("<pad>", "</s>", "<unk>", *vision_models.WORDS)


def words(limit: int = 16, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=limit, **special, **options)


def clip(cls: Any, width: int) -> Any:
    last = len(vision_models._vocabulary())
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}
    special = {"vocab_size": last, "max_position_embeddings": 16, "bos_token_id": last - 2, "eos_token_id": last - 1}
    return cls(CLIPTextConfig(**sizes, **special, projection_dim=width))


def t5() -> T5EncoderModel:
    sizes = {"d_model": TEXT, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
    return T5EncoderModel(T5Config(**sizes))


def vae(**options: Any) -> diffusers.AutoencoderKL:
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**{**sizes, **blocks, "shift_factor": 0.1, "scaling_factor": 0.7, **options})


def sd3(folder: Path) -> Any:
    tokenizer = vision_models._tokenizer(folder)
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusion_models.sd3(),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(CLIPTextModelWithProjection, 4),
        text_encoder_2=clip(CLIPTextModelWithProjection, 6),
        text_encoder_3=t5(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=words(),
    )


def flux(folder: Path) -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusion_models.flux(in_channels=16),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=clip(CLIPTextModel, diffusion_models.POOLED),
        text_encoder_2=t5(),
        tokenizer=vision_models._tokenizer(folder),
        tokenizer_2=words(),
    )


PIPELINES: dict[str, Callable[[Path], Any]] = {"sd3": sd3, "flux": flux}


def saved(name: str, folder: Path) -> Path:
    """A pipeline with fixed weights in a folder, as `from_pretrained` takes it."""
    (folder / "words").mkdir(parents=True)
    torch.manual_seed(0)
    PIPELINES[name](folder / "words").save_pretrained(folder / "model")
    return folder / "model"
