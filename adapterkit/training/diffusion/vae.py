"""Pictures as latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def kl_latents(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the scaled latents of an AutoencoderKL, in float32 on the CPU.

    Args:
        vae: One that overflows in half precision (`force_upcast`) encodes in float32.
        images: [n, 3, height, width], 0 to 1.
    """
    dtype = vae.dtype
    upcast = vae.config.force_upcast and dtype != torch.float32
    if upcast:
        vae.to(torch.float32)
    shift = vae.config.shift_factor or 0.0
    posterior = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist
    mean = (posterior.mean.float().cpu() - shift) * vae.config.scaling_factor
    spread = posterior.std.float().cpu() * vae.config.scaling_factor
    if upcast:
        vae.to(dtype)
    return mean, spread
