"""Keys for what some pipelines can do, or need."""

from __future__ import annotations

from pydantic import Field

from adapterkit.training.config import Section


class TextOptions(Section):
    """How captions are read.

    Attributes:
        caption_chunks: How many times the 75 tokens that CLIP reads a caption of Stable Diffusion 1.x, 2.x and XL may
            have; samples read theirs alike.
    """

    caption_chunks: int = Field(1, ge=1, le=8)


class StartOptions(Section):
    """What samples begin from, where a pipeline changes pictures: a refiner, inpainting.

    Attributes:
        sample_image: A picture.
        sample_mask: What of it is painted anew, where it is white; by default all.
        sample_strength: How much of it a refiner makes anew.
    """

    sample_image: str | None = Field(None, min_length=1)
    sample_mask: str | None = Field(None, min_length=1)
    sample_strength: float = Field(0.3, gt=0, le=1)
