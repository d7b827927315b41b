"""The keys of the task `diffusion`."""

from __future__ import annotations

from pydantic import Field

from adapterkit.training.config import Section, Seed
from adapterkit.training.sizes import Resolution


class PictureOptions(Section):
    """What is made of the folder.

    Attributes:
        resolution: Side of the square that images are cut to, or `[height, width]`, in pixels; by default what the
            denoiser was made for.
        flip: Mirror half of the images.
        caption: For images that have no text file.
        caption_dropout: Share of the steps' captions that are emptied, so that guidance keeps working.
    """

    resolution: Resolution = None
    flip: bool = False
    caption: str | None = None
    caption_dropout: float = Field(0.1, ge=0, le=1)


class SampleOptions(Section):
    """How samples are drawn.

    Attributes:
        prompts: What samples are made from; by default the first four captions.
        sample_seeds: The seeds of those samples: one image for each prompt and seed.
        sample_steps: Denoising steps of a sample.
        guidance_scale: Guidance of a sample.
    """

    prompts: list[str] = Field([])
    sample_seeds: list[Seed] = Field([42], min_length=1)
    sample_steps: int = Field(25, gt=0)
    guidance_scale: float = Field(7.5, ge=0)


class Options(PictureOptions, SampleOptions):
    """The keys under `options`."""
