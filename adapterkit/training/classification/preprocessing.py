"""What a classifier's images are made into: as its own preprocessing says, or cut to a size and normalised."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterkit.errors import ConfigError
from adapterkit.training.classifiers import is_transformers, made_for
from adapterkit.training.image_files import cover, open_image
from adapterkit.training.loading import load_image_processor
from adapterkit.training.sizes import Size

if TYPE_CHECKING:
    from PIL import Image

_HALF = (0.5, 0.5, 0.5)
_USUAL = (224, 224)
_PROBES = ((80, 64), (64, 80), (300, 200))


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
    """

    size: Size
    channels: int
    transform: Callable[[Image.Image], Tensor]
    look: Look
    note: str = ""

    @property
    def mode(self) -> str:
        """Pillow's name for the channels."""
        return "L" if self.channels == 1 else "RGB"

    def read(self, path: Path) -> Tensor:
        """[channels, height, width], normalised."""
        return self.transform(open_image(path, self.mode))


@dataclass(frozen=True)
class Covering:
    """Resizes until both sides cover the size, cuts out the centre and normalises.

    Attributes:
        height, width: The size.
        look: What is normalised by.
    """

    height: int
    width: int
    look: Look

    def __call__(self, image: Image.Image) -> Tensor:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.look.mean, self.look.std))
        return (cover(image, self.width, self.height) * self.look.scale - mean) / std


@dataclass(frozen=True)
class Processing:
    """What an image processor of transformers does."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


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
    return Pixels((height, width), channels, data.create_transform(**told, is_training=False), look)


def _of_transformers(model: Any, name: str, size: Size | None) -> Pixels:
    config = getattr(model.config, "vision_config", model.config)
    channels = getattr(config, "num_channels", 3)
    processor, reason = load_image_processor(name)
    fixed = _fixed_size(processor, name) if processor is not None and channels == 3 else None
    if fixed is not None and size in (None, fixed):
        return Pixels(fixed, channels, Processing(processor), _look(processor, channels))
    height, width = size or made_for(model) or _USUAL
    if processor is None:
        look = Look(_per_channel(_HALF, channels), _per_channel(_HALF, channels))
        note = f"model: {reason}; images are cut to {height} x {width}, with values from -1 to 1"
        return Pixels((height, width), channels, Covering(height, width, look), look, note)
    look = _look(processor, channels)
    return Pixels((height, width), channels, Covering(height, width, look), look)


def _look(processor: Any, channels: int) -> Look:
    from PIL.Image import Resampling

    resample = getattr(processor, "resample", None)
    name = "bicubic" if resample is None else Resampling(int(resample)).name.lower()
    scale = 255 * processor.rescale_factor if getattr(processor, "do_rescale", True) else 255.0
    if not getattr(processor, "do_normalize", False):
        return Look([0.0] * channels, [1.0] * channels, scale, name)
    mean, std = (_per_channel(values, channels) for values in (processor.image_mean, processor.image_std))
    return Look(mean, std, scale, name)


def _fixed_size(processor: Any, name: str) -> Size | None:
    """The sides of what an image processor makes; None where they depend on the image."""
    from PIL import Image

    try:
        shapes = {tuple(Processing(processor)(Image.new("RGB", sides)).shape) for sides in _PROBES}
    except Exception as error:
        raise ConfigError(
            [f"model: the image processor of {name} fails ({type(error).__name__}: {error}); set options.resolution"],
            "run",
        ) from error
    shape = shapes.pop()
    return None if shapes or len(shape) != 3 else (shape[1], shape[2])


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    row = [float(value) for value in values]
    return row if len(row) == channels else [sum(row) / len(row)] * channels
