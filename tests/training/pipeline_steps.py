"""What a pipeline's own loop takes for its denoiser's prediction: the reference that recipes are held against."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor


class Fixed:
    """A scheduler with one step, at a given time, that notes what it is told."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, config: Any, time: float) -> None:
        self.config, self.time = config, time
        self.timesteps = torch.tensor([time])
        self.sigmas = torch.tensor([time / 1000, 0.0])
        self.told: list[Tensor] = []

    def set_timesteps(
        self, steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None, timesteps: Any = None
    ) -> None: ...

    def set_begin_index(self, index: int) -> None: ...

    def scale_model_input(self, latents: Tensor, time: Tensor) -> Tensor:
        return latents

    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return latents  # they are noisy already

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        self.told.append(prediction)
        return latents, latents


def squares(latents: Tensor) -> Tensor:
    """[b, c, h, w] as tokens of two by two pixels, [b, h w / 4, 4 c], channels first within one."""
    count, channels, height, width = latents.shape
    apart = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
    return torch.einsum("bchpwq->bhwcpq", apart).reshape(count, -1, 4 * channels)


def pixels(tokens: Tensor, like: Tensor) -> Tensor:
    """The other way round."""
    count, channels, height, width = like.shape
    apart = tokens.reshape(count, height // 2, width // 2, channels, 2, 2)
    return torch.einsum("bhwcpq->bchpwq", apart).reshape(like.shape)


def unrows(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens of one pixel, [b, h w, c], as [b, c, h, w]."""
    return tokens.transpose(1, 2).reshape(like.shape)


# How a pipeline takes latents, and gives predictions; others have them as they are.
PACKED = {
    "FluxPipeline": (squares, pixels),
    "WanPipeline": (lambda latents: latents[:, :, None], lambda found, like: found[:, :, 0]),
    "QwenImagePipeline": (squares, pixels),
    "Flux2Pipeline": (lambda latents: latents, unrows),
    "Flux2KleinPipeline": (lambda latents: latents, unrows),
}


def own_prediction(pipe: Any, prompt: str, noisy: Tensor, time: float, size: tuple[int, int], **options: Any) -> Tensor:
    """What the pipeline predicts for latents [1, c, h, w] at a time, 0 to 1000, of a picture of that size.

    Args:
        **options: For the pipeline's call; None leaves one out that it would be given here.
    """
    pack, unpack = PACKED.get(type(pipe).__name__, (lambda x: x, lambda x, like: x.reshape(like.shape)))
    own = copy.copy(pipe)
    scheduler = Fixed(pipe.scheduler.config, time)
    object.__setattr__(own, "scheduler", scheduler)
    unguided = 0.0 if type(pipe).__name__ == "ZImagePipeline" else 1.0  # whose guidance counts from 0
    given = {"height": size[0], "width": size[1], "guidance_scale": unguided, "output_type": "latent", **options}
    if "use_resolution_binning" in inspect.signature(type(pipe).__call__).parameters:
        given["use_resolution_binning"] = False
    given = {"prompt": prompt, "latents": pack(noisy), "num_inference_steps": 1, **given}
    with torch.no_grad():
        own(**{key: value for key, value in given.items() if value is not None})
    return unpack(scheduler.told[0], noisy)
