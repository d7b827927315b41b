"""The parts of the embedded Stable Diffusion pipeline, built from scratch: 32x32 pictures, 8x8 latents, 4 channels.

Tokenizer, text encoder, autoencoder, UNet and scheduler are the very classes that a Stable Diffusion 1.5 pipeline is
made of, only smaller, so that whatever works here works there with the same calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_LENGTH = 32
TEXT_WIDTH = 64
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE (GPT-2, CLIP) writes bytes: printable ones as themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (byte for byte in range(256) if byte not in printable)
    shown = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [shown[byte] for byte in range(256)]


def word_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """BPE merges that make each word one token, from left to right, without repetition."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        left = pieces[0]
        for piece in pieces[1:]:
            merges[left, piece] = None
            left += piece
    return list(merges)


def build_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer that has `words` as whole tokens and spells everything else in bytes."""
    letters = byte_alphabet()
    merges = word_merges(sorted(set(words)))
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)])
    vocab = {token: i for i, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of two layers, 64 wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_text_head() -> nn.Linear:
    """Reads the digit (10, or none) and the look (3, or none) off a text state; only pretraining needs it."""
    return nn.Linear(TEXT_WIDTH, 11 + 4)


def build_vae() -> AutoencoderKL:
    """An autoencoder from pictures [b, 3, 32, 32] in [-1, 1] to latents [b, 4, 8, 8]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
    )


def build_unet() -> UNet2DConditionModel:
    """A noise predictor on latents [b, 4, 8, 8] with cross attention on both of its levels."""
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.5."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [b, TEXT_LENGTH] of captions, padded and cut as the pipeline does it."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")[
        "input_ids"
    ]


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Folds (z - mean) / std into the convolutions on either side of the latent, so that it has mean 0 and std 1.

    The pipeline knows one scaling factor only; latents that are off centre would cost the diffusion model contrast.

    Args:
        vae: Changed in place; its reconstructions stay what they were.
        mean: Mean of each latent channel, [4].
        std: Standard deviation of each latent channel, [4].
    """
    before, after = vae.quant_conv, vae.post_quant_conv
    z = len(mean)
    before.weight[:z] /= std.view(-1, 1, 1, 1)
    before.bias[:z] = (before.bias[:z] - mean) / std
    before.bias[z:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.view(1, -1, 1, 1)


def build_pipeline(parts: dict[str, Any]) -> StableDiffusionPipeline:
    """A complete pipeline of `tokenizer`, `text_encoder`, `vae`, `unet` and `scheduler`."""
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
    )


def load_pipeline(folder: str | Path, device: str = "cpu") -> StableDiffusionPipeline:
    """The saved pipeline in single precision, without a progress bar.

    Args:
        folder: Where `save_pretrained` wrote it.
        device: Where to put it.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
