"""Qwen-Image: Qwen2.5-VL reads the text, as long as it is, and Wan's autoencoder takes pictures for videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.training.diffusion.conditioning import Conditioning
from adapterkit.training.diffusion.recipe import Recipe
from adapterkit.training.diffusion.vae import normed_latents

_TOKENS = 512  # of a caption, when the pipeline is called


class QwenImage(Recipe):
    """Flow matching with a transformer of two streams (Wu et al. 2025, arXiv:2508.02324)."""

    patch: ClassVar[int] = 2

    def token_limits(self) -> list[tuple[Any, int]]:
        return [(self.pipe.tokenizer, _TOKENS)]

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        states, mask = self.pipe.encode_prompt(list(texts), device, max_sequence_length=_TOKENS)
        whole = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return {"states": states, "mask": whole if mask is None else mask.bool()}

    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return normed_latents(self.pipe.vae, pictures)

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        count, channels, height, width = noisy.shape
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = torch.full((count,), self.options.guidance_embedding, device=noisy.device)
        found = self.model(
            self.pipe._pack_latents(noisy, count, channels, height, width),
            text["states"],
            text["mask"],
            times,
            [[(1, height // 2, width // 2)]] * count,
            guidance=guidance,
        ).sample
        return self.pipe._unpack_latents(found, height * self.factor, width * self.factor, self.factor)[:, :, 0]

    def prompt_arguments(self, prompt: str, negative: str | None) -> dict[str, Any]:
        """With something to steer away from, without which there is no guidance."""
        distilled = self.model.config.guidance_embeds
        return super().prompt_arguments(prompt, negative if negative is not None or distilled else " ")

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """By two evaluations, unless the model was distilled from guidance."""
        return {"guidance_scale" if self.model.config.guidance_embeds else "true_cfg_scale": guidance}
