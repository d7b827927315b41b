"""Pictures as latents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def kl_latents(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the scaled latents of an AutoencoderKL, in float32 on the CPU.

    Args:
        vae: One that overflows in half precision (`force_upcast`) encodes in float32.
        images: [n, 3, height, width], 0 to 1.
    """
    shift = vae.config.shift_factor or 0.0
    with wide_enough(vae):
        posterior = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist
    mean = (posterior.mean.float().cpu() - shift) * vae.config.scaling_factor
    return mean, posterior.std.float().cpu() * vae.config.scaling_factor


@contextlib.contextmanager
def wide_enough(vae: Any) -> Iterator[None]:
    """An autoencoder that overflows in half precision in float32; within another such `with` it is already."""
    dtype = vae.dtype
    upcast = vae.config.get("force_upcast", False) and dtype != torch.float32
    if upcast:
        nn.Module.to(vae, torch.float32)  # without what diffusers' own `to` says each time
    try:
        yield
    finally:
        if upcast:
            nn.Module.to(vae, dtype)


@torch.no_grad()
def normed_latents(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The same of an autoencoder of videos that knows mean and deviation of each channel; pictures are one frame.

    Args:
        vae: Such as those of Wan and Qwen-Image.
        images: [n, 3, height, width], 0 to 1.
    """
    posterior = vae.encode((images * 2 - 1)[:, :, None].to(vae.device, vae.dtype)).latent_dist
    mean, spread = (torch.tensor(told).view(1, -1, 1, 1) for told in (vae.config.latents_mean, vae.config.latents_std))
    return (posterior.mean[:, :, 0].float().cpu() - mean) / spread, posterior.std[:, :, 0].float().cpu() / spread


@torch.no_grad()
def certain_latents(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The same of an autoencoder without a distribution, such as AutoencoderDC: the deviation is 0."""
    latents = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent.float().cpu() * vae.config.scaling_factor
    return latents, torch.zeros_like(latents)
