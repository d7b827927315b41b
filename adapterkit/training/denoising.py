"""What a latent diffusion model with a UNet needs: latents, text conditioning, the target of a noise schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.training.sizes import Size

BATCH = 8
"""Images that the VAE encodes at a time."""


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told about a batch of captions.

    Attributes:
        states: [batch, tokens, features].
        pooled: [batch, features] for pipelines with two text encoders, else None.
    """

    states: Tensor
    pooled: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Several captions as one batch."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)

    def arguments(self, size: Size) -> dict[str, Any]:
        """The UNet's keyword arguments; for SDXL with the size that the image has, uncropped."""
        if self.pooled is None:
            return {"encoder_hidden_states": self.states}
        sizes = torch.tensor([*size, 0, 0, *size], device=self.pooled.device)
        times = sizes.to(self.pooled.dtype).expand(len(self.pooled), -1)
        return {
            "encoder_hidden_states": self.states,
            "added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": times},
        }


def text_parts(pipe: Any) -> frozenset[str]:
    """The names of the pipeline's text encoders."""
    return frozenset(n for n in ("text_encoder", "text_encoder_2") if pipe.components.get(n) is not None)


def encode(pipe: Any, texts: Sequence[str], device: torch.device) -> Conditioning:
    """The captions as the pipeline itself would encode prompts."""
    found = pipe.encode_prompt(list(texts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return Conditioning(found[0], found[2] if len(found) == 4 else None)


@torch.no_grad()
def latents_of(vae: Any, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the scaled latents, in float32 on the CPU.

    Args:
        vae: An AutoencoderKL. One that overflows in half precision (`force_upcast`) encodes in float32.
        images: [n, 3, height, width], 0 to 1.
        device: Where the VAE is.
    """
    dtype = vae.dtype
    upcast = vae.config.force_upcast and dtype != torch.float32
    if upcast:
        vae.to(torch.float32)
    shift = vae.config.shift_factor or 0.0
    means, spreads = [], []
    for batch in images.split(BATCH):
        posterior = vae.encode((batch * 2 - 1).to(device, vae.dtype)).latent_dist
        means.append((posterior.mean.float().cpu() - shift) * vae.config.scaling_factor)
        spreads.append(posterior.std.float().cpu() * vae.config.scaling_factor)
    if upcast:
        vae.to(dtype)
    return torch.cat(means), torch.cat(spreads)


def target_of(scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """What the UNet should predict.

    With a = alphas_cumprod at the time: the noise; or the velocity sqrt(a) noise - sqrt(1 - a) latents (Salimans and
    Ho 2022, arXiv:2202.00512, section 4); or the latents themselves.
    """
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, times)
    return latents if kind == "sample" else noise
