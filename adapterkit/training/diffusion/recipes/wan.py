"""Wan: a model of videos, which learns from pictures as videos of one frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.errors import ConfigError
from adapterkit.training.diffusion.conditioning import Conditioning
from adapterkit.training.diffusion.recipe import Recipe
from adapterkit.training.diffusion.vae import normed_latents
from adapterkit.training.sizes import Size

_TOKENS = 512  # of a caption, with what fills it up; `encode_prompt` alone takes 226


class Wan(Recipe):
    """2.1 and 2.2 (arXiv:2503.20314). The larger 2.2 has a second denoiser for times with little noise."""

    patch: ClassVar[int] = 2

    @property
    def model(self) -> Any:
        """The denoiser of the times that are trained."""
        boundary = self.pipe.config.boundary_ratio
        late = boundary is not None and self.options.time_range[1] <= boundary
        return self.pipe.transformer_2 if late else self.pipe.transformer

    @property
    def factor(self) -> int:
        return self.pipe.vae_scale_factor_spatial

    def size(self) -> Size:
        """The pipeline's default."""
        return 480, 832

    def check(self) -> None:
        boundary, (low, high) = self.pipe.config.boundary_ratio, self.options.time_range
        if boundary is not None and low < boundary < high:
            raise ConfigError(
                [
                    f"options.time_range: this model has one denoiser for times above {boundary} and one for those "
                    f"below. Train one: [{boundary}, 1.0] with targets at @component=transformer, or [0.0, {boundary}] "
                    "with @component=transformer_2"
                ],
                "run",
            )

    def token_limits(self) -> list[tuple[Any, int]]:
        return [(self.pipe.tokenizer, _TOKENS)]

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        """With as many zeros behind the text as when the pipeline is called: they are attended to."""
        given = {"do_classifier_free_guidance": False, "max_sequence_length": _TOKENS, "device": device}
        states, _ = self.pipe.encode_prompt(list(texts), **given)
        return {"states": states}

    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return normed_latents(self.pipe.vae, pictures)

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        clock = times * 1000
        if self.pipe.config.expand_timesteps:  # one for each token
            clock = clock[:, None].expand(-1, self.tokens(noisy))
        return self.model(noisy[:, :, None], clock, text["states"]).sample[:, :, 0]

    def size_arguments(self, size: Size) -> dict[str, Any]:
        """One frame."""
        return {**super().size_arguments(size), "num_frames": 1}

    def picture(self, made: Any) -> Any:
        return made.frames[0][0]
