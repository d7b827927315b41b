"""Keys for what some pipelines can do, or need, and for what is measured."""

from __future__ import annotations

from pydantic import Field, model_validator

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


class ValidationOptions(Section):
    """What is measured beside samples, on fixed noise and at fixed times.

    Attributes:
        validation_fraction: Share of the pictures that is not trained on.
        validation_data: Or a folder of captioned pictures for that alone.
        validation_times: At how many times each picture is measured.
    """

    validation_fraction: float = Field(0.0, ge=0, lt=1)
    validation_data: str | None = Field(None, min_length=1)
    validation_times: int = Field(4, gt=0)

    @model_validator(mode="after")
    def _check_one(self) -> ValidationOptions:
        if self.validation_fraction and self.validation_data:
            raise ValueError("give validation_fraction or validation_data, not both")
        return self


class PlaceOptions(Section):
    """What is where.

    Attributes:
        offload: Whether the autoencoder, text encoders that are not trained and what else a step does not need wait on
            the CPU; it changes no number.
    """

    offload: bool = True
