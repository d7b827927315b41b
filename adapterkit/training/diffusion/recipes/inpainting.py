"""Inpainting of Stable Diffusion 1.x, 2.x and XL: a UNet that sees a mask, and the latents of what it leaves, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.errors import ConfigError, UnsupportedModelError
from adapterkit.training.diffusion.recipe import Recipe
from adapterkit.training.diffusion.recipes.starting import starting_picture
from adapterkit.training.diffusion.recipes.unet import StableDiffusion, StableDiffusionXL
from adapterkit.training.sizes import Size


class _Painting(Recipe):
    """What both sizes share: examples have a `hole`, which masks say, and `surroundings`, the latents around it."""

    paints_holes: ClassVar[bool] = True

    def check(self) -> None:
        channels = (self.model.config.in_channels, self.pipe.vae.config.latent_channels)
        if channels[0] != 2 * channels[1] + 1:
            raise UnsupportedModelError(
                f"the UNet takes {channels[0]} channels and the VAE makes {channels[1]}; for inpainting it would take "
                f"{2 * channels[1] + 1}: latents, a mask and the latents around it"
            )
        if self.options.sample_image is None:
            raise ConfigError(
                ["options.sample_image: name a picture for samples to begin from, and a sample_mask"], "run"
            )

    def inputs(self, noisy: Tensor, batch: Mapping[str, Any]) -> Tensor:
        hole, surroundings = batch["hole"].to(noisy.dtype), batch["surroundings"].to(noisy.dtype)
        return torch.cat([noisy, hole, surroundings], dim=1)

    def size_arguments(self, size: Size) -> dict[str, Any]:
        """A picture of that size and its mask; all of what is masked is made anew."""
        picture, mask = starting_picture(self.options, size)
        return {"image": picture, "mask_image": mask, "height": size[0], "width": size[1], "strength": 1.0}


class Inpainting(_Painting, StableDiffusion):
    """1.x and 2.x."""


class InpaintingXL(_Painting, StableDiffusionXL):
    """XL."""
