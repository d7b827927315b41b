"""Flux: CLIP's pooled text, T5's tokens, and latents of which four pixels are one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.training.diffusion.conditioning import Conditioning
from adapterkit.training.diffusion.recipe import Recipe


class Flux(Recipe):
    """Flux.1: dev, which is told its guidance, and schnell."""

    encoders: ClassVar[Sequence[str]] = ("text_encoder", "text_encoder_2")
    tokenizers: ClassVar[Sequence[str]] = ("tokenizer", "tokenizer_2")
    patch: ClassVar[int] = 2

    def token_limits(self) -> list[tuple[Any, int]]:
        """T5's: of CLIP only what sums up the text is used."""
        return [(self.pipe.tokenizer_2, 512)]

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        states, pooled, _ = self.pipe.encode_prompt(list(texts), None, device)
        return {"states": states, "pooled": pooled}

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        count, channels, height, width = noisy.shape
        packed = self.pipe._pack_latents(noisy, count, channels, height, width)
        places = self.pipe._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype)
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = torch.full((count,), self.options.guidance_embedding, device=noisy.device)
        found = self.model(
            packed,
            text["states"],
            text["pooled"],
            times,
            places,
            torch.zeros(text["states"].shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            guidance,
        ).sample
        factor = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(found, height * factor, width * factor, factor)
