"""Flux.2: a language model reads the text, and the autoencoder's batch norm scales latents of two by two pixels."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.training.diffusion.conditioning import Conditioning
from adapterkit.training.diffusion.recipe import Recipe

_STEPS = 50  # of a sample, by which the pipeline shifts its times; its own default


class Flux2(Recipe):
    """Flux.2 dev, which is told its guidance, and klein, which is not."""

    patch: ClassVar[int] = 2

    def readers(self) -> dict[str, Any]:
        """A processor's own tokenizer."""
        tokenizer = self.pipe.tokenizer
        return {"text_encoder": getattr(tokenizer, "tokenizer", tokenizer)}

    def token_limits(self) -> list[tuple[Any, int]]:
        return [(self.readers()["text_encoder"], self.pipe.tokenizer_max_length)]

    def tokens(self, latents: Tensor) -> int:
        """One for each of the latents' pixels, which are patches already."""
        return latents[0, 0].numel()

    def shift(self, tokens: int) -> float:
        """As the pipeline shifts times, which is not by the scheduler's settings."""
        if not self.pipe.scheduler.config.use_dynamic_shifting:
            return super().shift(tokens)
        own: Any = importlib.import_module(type(self.pipe).__module__)
        return float(torch.tensor(own.compute_empirical_mu(tokens, _STEPS)).exp())

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        states, _ = self.pipe.encode_prompt(list(texts), device)
        return {"states": states}

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        posterior = vae.encode((pictures * 2 - 1).to(vae.device, vae.dtype)).latent_dist
        mean, spread = (self.pipe._patchify_latents(part.float().cpu()) for part in (posterior.mean, posterior.std))
        middle = vae.bn.running_mean.float().cpu().view(1, -1, 1, 1)
        scale = (vae.bn.running_var.float().cpu().view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        return (mean - middle) / scale, spread / scale

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = torch.full((len(noisy),), self.options.guidance_embedding, device=noisy.device)
        found = self.model(
            self.pipe._pack_latents(noisy),
            text["states"],
            times,
            self.pipe._prepare_latent_ids(noisy).to(noisy.device),
            self.pipe._prepare_text_ids(text["states"]).to(noisy.device),
            guidance,
        ).sample
        return found.transpose(1, 2).reshape(noisy.shape)
