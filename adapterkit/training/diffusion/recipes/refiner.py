"""The refiner of Stable Diffusion XL, which takes the last noise away from a picture that is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.errors import ConfigError
from adapterkit.training.diffusion.options import Options
from adapterkit.training.diffusion.recipes.starting import starting_picture
from adapterkit.training.diffusion.recipes.unet import StableDiffusionXL

_SCORE = 6.0  # how beautiful pictures are, as the pipeline says by default
_LAST = (0.0, 0.2)
"""The noise that it is for (Podell et al. 2023, arXiv:2307.01952, section 2.5: the first 200 of 1000 steps)."""


class Refiner(StableDiffusionXL):
    """It has the second text encoder alone, and is told a score in place of the size that is left."""

    encoders: ClassVar[Sequence[str]] = ("text_encoder_2",)
    tokenizers: ClassVar[Sequence[str]] = ("tokenizer_2",)

    def __init__(self, pipe: Any, options: Options) -> None:
        told = options if "time_range" in options.model_fields_set else options.model_copy(update={"time_range": _LAST})
        super().__init__(pipe, told)

    def check(self) -> None:
        super().check()
        if self.options.sample_image is None:
            raise ConfigError(["options.sample_image: name a picture for samples to begin from"], "run")

    def time_ids(self, sizes: Tensor) -> Tensor:
        if not self.pipe.config.requires_aesthetics_score:
            return sizes
        return torch.cat([sizes[:, :4].float(), sizes.new_full((len(sizes), 1), _SCORE, dtype=torch.float32)], dim=1)

    def size_arguments(self, size: tuple[int, int]) -> dict[str, Any]:
        """A picture of that size, and how much of it is made anew."""
        picture, _ = starting_picture(self.options, size)
        return {"image": picture, "strength": self.options.sample_strength}
