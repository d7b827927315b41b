"""Samples of a denoiser: which there are, and how one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapterkit.training.diffusion.material import Material
from adapterkit.training.diffusion.sample_sizes import check_sizes
from adapterkit.training.samples.prompts import Prompt, samples_of
from adapterkit.training.samples.sample import Sample

_CAPTIONS = 4


class Drawing(Material):
    """The part of the task that draws."""

    sampling = ("resolution", "sample_steps", "guidance_scale", "caption_chunks")
    captions: Sequence[str]

    def samples(self) -> Sequence[Sample]:
        """Those of the options, or of the first four different captions."""
        captions = list(dict.fromkeys(self.captions))[:_CAPTIONS]
        prompts = self.options.prompts or [Prompt.model_validate({"prompt": text}) for text in captions]
        return samples_of(prompts, self.options.sample_seeds)

    def generate(self, sample: Sample, path: Path) -> None:
        """One picture, from noise that depends on the seed alone."""
        self.picture(sample, self.options.sample_steps).save(path)

    def picture(self, sample: Sample, steps: int, kind: str = "pil") -> Any:
        """One picture.

        Args:
            sample: What is to be drawn.
            steps: Denoising steps where it says none.
            kind: "pil" for one of Pillow's, "np" for an array of floats.

        Raises:
            ConfigError: Its size does not fit the model.
        """
        check_sizes([sample], self.recipe.multiple)
        size = sample.size or self.size
        guidance = self.options.guidance_scale if sample.guidance is None else sample.guidance
        noise = torch.Generator().manual_seed(sample.seed)
        [prompt] = self.words([sample.prompt])
        negative = None if sample.negative is None else self.words([sample.negative])[0]
        with self.residence.needing():
            return self.recipe.draw(prompt, size, sample.steps or steps, guidance, noise, negative, kind)
