"""The keys under `options` of a run that classifies images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from adapterkit.training.classification.tables import Columns
from adapterkit.training.config import Section
from adapterkit.training.sizes import Resolution

_Share = Annotated[float, Field(ge=0, le=1)]


class Options(Section):
    """The keys under `options`.

    Attributes:
        resolution: Side of the square that images are brought to, or `[height, width]`, in pixels; by default what the
            model was made for. A model with positions for another size interpolates them.
        validation: A folder or table to measure with. By default that is the part `val` or `test` of the data, or else
            a share of it.
        validation_fraction: Share of the images, of each class alike, that is held out to measure with, where nothing
            else is; 0 for none.
        multi_label: Whether an image may be of several classes, or of none. A cell of a table then holds several,
            separated by `|`, `;` or `,`, or there is a column of 0 and 1 for each class.
        columns: What a table's columns `file`, `label` and `split` are called.
        images: What the files in a table are relative to; by default its own folder.
        crop_scale: Train on random parts of images with these shares of the area, such as `[0.35, 1.0]`, in any of the
            aspect ratios `crop_ratio`; by default on what the model is measured with.
        crop_ratio: Widths by heights of such parts.
        flip: Mirror half of the training images.
        vertical_flip: Turn half of them upside down.
        auto_augment: A policy of timm, such as `rand-m9-mstd0.5-inc1` (RandAugment), `augmix-m5` or `original`.
        colour: How far brightness, contrast and saturation are changed, such as 0.4.
        random_erasing: How often a rectangle is blanked, such as 0.25.
        mixup: Alpha of the share in which two images are mixed, such as 0.2; 0 never mixes.
        cutmix: Alpha of the share of one image that is put into another; with mixup, one of them by chance.
        mix_probability: How often a batch is mixed.
        label_smoothing: The share of the target that is spread over all classes.
        class_weights: What classes count in the loss: `balanced`, by how rare they are, or a number for each name; 1
            for the others.
        train_head: Replace the model's head (or heads) by a fresh one for these classes, which trains as a part of the
            adapter, of type `trainable`, in its file. Otherwise the model must have as many classes as there are in
            the data.
        model_args: For `timm.create_model`, such as `{img_size: 32}` or `{pretrained: false}`.
    """

    resolution: Resolution = None
    validation: str | None = None
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    multi_label: bool = False
    columns: dict[Literal["file", "label", "split"], str] = Field({})
    images: str | None = None
    crop_scale: list[float] | None = None
    crop_ratio: list[float] = Field([3 / 4, 4 / 3])
    flip: bool = False
    vertical_flip: bool = False
    auto_augment: str | None = None
    colour: float = Field(0.0, ge=0, le=1)
    random_erasing: _Share = 0.0
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    mix_probability: _Share = 1.0
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    train_head: bool = False
    model_args: dict[str, Any] = Field({})

    @field_validator("crop_scale")
    @classmethod
    def _shares(cls, value: list[float] | None) -> list[float] | None:
        if value is None or (len(value) == 2 and 0 < value[0] <= value[1] <= 1):
            return value
        raise ValueError("must be two shares of the area such as [0.35, 1.0]")

    @field_validator("crop_ratio")
    @classmethod
    def _ratios(cls, value: list[float]) -> list[float]:
        if len(value) == 2 and 0 < value[0] <= value[1]:
            return value
        raise ValueError("must be two ratios of width to height such as [0.75, 1.33]")

    @field_validator("class_weights")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if isinstance(value, dict) and not all(weight >= 0 for weight in value.values()):
            raise ValueError("must not have negative weights")
        return value

    @property
    def tables(self) -> Columns:
        """How tables are read."""
        return Columns(self.columns, None if self.images is None else Path(self.images), self.multi_label)
