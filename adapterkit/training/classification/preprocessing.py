"""What a classifier's images are made into: as its own preprocessing says, or brought to a size and normalised."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adapterkit.errors import ConfigError
from adapterkit.training.classification.processors import Processing, brought_to, covering, fixed_size
from adapterkit.training.classifiers import is_transformers, made_for
from adapterkit.training.image_files import open_image
from adapterkit.training.loading import load_image_processor
from adapterkit.training.sizes import Size

if TYPE_CHECKING:
    from PIL import Image

_HALF = (0.5, 0.5, 0.5)
_USUAL = (224, 224)


@dataclass(frozen=True)
class Look:
    """What images are normalised by: (value * scale - mean) / std, where white is 1.

    Attributes:
        mean, std: A number for each channel.
        scale: What white is for them.
        interpolation: How images are resized, by Pillow's name.
    """

    mean: Sequence[float]
    std: Sequence[float]
    scale: float = 1.0
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class Pixels:
    """How an image file becomes a model's input.

    Attributes:
        size: Height and width of the input.
        channels: Of the input.
        transform: Makes it of an image with these channels.
        look: What it normalises by.
        note: What the user should know of it; empty where there is nothing.
        told: Of a model of timm, what its transforms are made from.
    """

    size: Size
    channels: int
    transform: Callable[[Image.Image], Tensor]
    look: Look
    note: str = ""
    told: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def mode(self) -> str:
        """Pillow's name for the channels."""
        return "L" if self.channels == 1 else "RGB"

    def read(self, path: Path) -> Tensor:
        """[channels, height, width], normalised."""
        return self.transform(open_image(path, self.mode))


def pixels_of(model: Any, name: str, size: Size | None) -> Pixels:
    """What a model was trained on.

    Args:
        model: Of timm or transformers.
        name: The folder or hub id that it is from, where its preprocessing is told.
        size: Other sides than its own.

    Raises:
        ConfigError: It takes no images of one or three channels.
    """
    found = _of_transformers(model, name, size) if is_transformers(model) else _of_timm(model, size)
    if found.channels in (1, 3):
        return found
    raise ConfigError([f"model: {name} takes {found.channels} channels; images are read with 3, or with 1"], "run")


def _of_timm(model: Any, size: Size | None) -> Pixels:
    data: Any = importlib.import_module("timm.data")
    config: dict[str, Any] = data.resolve_model_data_config(model)
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    channels = first if first in (1, 3) else config["input_size"][0]  # a stem may fold pixels into channels
    height, width = size or made_for(model) or config["input_size"][1:]
    mean, std = (_per_channel(config[key], channels) for key in ("mean", "std"))
    told = {**config, "input_size": (channels, height, width), "mean": mean, "std": std}
    look = Look(mean, std, interpolation=config["interpolation"])
    return Pixels((height, width), channels, data.create_transform(**told, is_training=False), look, told=told)


def _of_transformers(model: Any, name: str, size: Size | None) -> Pixels:
    config = getattr(model.config, "vision_config", model.config)
    channels = getattr(config, "num_channels", 3)
    processor, reason = load_image_processor(name)
    note = ""
    if processor is None:
        sides = size or made_for(model) or _USUAL
        half = _per_channel(_HALF, channels)
        processor = covering(sides, half, half)
        how = "cut" if sides[0] == sides[1] else "brought"
        note = f"model: {reason}; images are {how} to {sides[0]} x {sides[1]}, with values from -1 to 1"
    else:
        fixed = fixed_size(processor, name) if channels == 3 else None
        sides = size or fixed or made_for(model) or _USUAL
        if sides != fixed:
            processor = _other_sides(processor, sides, channels)
    return Pixels(sides, channels, Processing(processor), _look(processor, channels), note)


def _other_sides(processor: Any, sides: Size, channels: int) -> Any:
    """A processor that makes images of these sides, with the same values."""
    changed = brought_to(processor, sides) if channels == 3 else None
    if changed is not None:
        return changed
    look, resample = _look(processor, channels), getattr(processor, "resample", None)
    factor = look.scale / 255 if getattr(processor, "do_rescale", True) else None
    return covering(sides, look.mean, look.std, 3 if resample is None else int(resample), factor)


def _look(processor: Any, channels: int) -> Look:
    from PIL.Image import Resampling

    resample = getattr(processor, "resample", None)
    name = "bicubic" if resample is None else Resampling(int(resample)).name.lower()
    scale = 255 * processor.rescale_factor if getattr(processor, "do_rescale", True) else 255.0
    if not getattr(processor, "do_normalize", False):
        return Look([0.0] * channels, [1.0] * channels, scale, name)
    mean, std = (_per_channel(values, channels) for values in (processor.image_mean, processor.image_std))
    return Look(mean, std, scale, name)


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    row = [float(value) for value in values]
    return row if len(row) == channels else [sum(row) / len(row)] * channels
