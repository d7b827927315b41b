"""Stable Diffusion 1.x, 2.x and XL: a UNet and CLIP's text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.errors import UnsupportedModelError
from adapterkit.training.diffusion.conditioning import Conditioning
from adapterkit.training.diffusion.recipe import Recipe


class StableDiffusion(Recipe):
    """1.x and 2.x."""

    denoiser: ClassVar[str] = "unet"

    def check(self) -> None:
        channels = (self.model.config.in_channels, self.pipe.vae.config.latent_channels)
        if channels[0] != channels[1]:
            raise UnsupportedModelError(
                f"the UNet takes {channels[0]} channels and the VAE makes {channels[1]}: an inpainting or "
                "image-conditioned pipeline, which this task does not train"
            )

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        states, _ = self.pipe.encode_prompt(list(texts), device, 1, do_classifier_free_guidance=False)
        return {"states": states}

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        return self.model(noisy, times, text["states"]).sample


class StableDiffusionXL(StableDiffusion):
    """XL: two text encoders, and the size and place of what was cut out (Podell et al. 2023, arXiv:2307.01952, 2.2)."""

    encoders: ClassVar[Sequence[str]] = ("text_encoder", "text_encoder_2")
    tokenizers: ClassVar[Sequence[str]] = ("tokenizer", "tokenizer_2")

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        states, _, pooled, _ = self.pipe.encode_prompt(list(texts), device=device, do_classifier_free_guidance=False)
        return {"states": states, "pooled": pooled}

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        added = {"text_embeds": text["pooled"], "time_ids": batch["sizes"].to(noisy.dtype)}
        return self.model(noisy, times, text["states"], added_cond_kwargs=added).sample
