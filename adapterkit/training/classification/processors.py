"""Image processors of transformers that bring images to other sides: what is written of them does the same there."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adapterkit.errors import ConfigError
from adapterkit.training.sizes import Size

if TYPE_CHECKING:
    from PIL import Image

_PROBES = ((80, 64), (64, 80), (300, 200))
_COVERING = "CLIPImageProcessor"  # which resizes and cuts as it is told


@dataclass(frozen=True)
class Processing:
    """What an image processor of transformers does."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def fixed_size(processor: Any, name: str) -> Size | None:
    """The sides of what an image processor makes; None where they depend on the image.

    Raises:
        ConfigError: It fails.
    """
    try:
        return _made(processor)
    except Exception as error:
        raise ConfigError(
            [f"model: the image processor of {name} fails ({type(error).__name__}: {error}); set options.resolution"],
            "run",
        ) from error


def _made(processor: Any) -> Size | None:
    from PIL import Image

    shapes = {tuple(Processing(processor)(Image.new("RGB", sides)).shape) for sides in _PROBES}
    shape = shapes.pop()
    return None if shapes or len(shape) != 3 else (shape[1], shape[2])


def brought_to(processor: Any, size: Size) -> Any | None:
    """The same processor for other sides, resizing and cutting in its own way; None where it does not make them."""
    for changes in _ways(processor, *size):
        with contextlib.suppress(Exception):  # what one processor refuses is how another is told
            changed = type(processor).from_dict({**processor.to_dict(), "do_resize": True, **changes})
            if _made(changed) == size:
                return changed
    return None


def _ways(processor: Any, height: int, width: int) -> Iterator[Mapping[str, Any]]:
    """How processors are told sides, those first that keep the share which is cut off."""
    told = getattr(processor, "size", None)
    edge = getattr(told, "shortest_edge", None)
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    sides = {"height": height, "width": width}
    if crop is not None and crop.height and crop.width:
        before = (edge, edge) if edge else (getattr(told, "height", None), getattr(told, "width", None))
        more = [max((side or 0) / cut, 1.0) for side, cut in zip(before, (crop.height, crop.width), strict=True)]
        if edge and height == width:
            yield {"size": {"shortest_edge": round(height * max(more))}, "crop_size": sides}
        yield {"size": {"height": round(height * more[0]), "width": round(width * more[1])}, "crop_size": sides}
    if edge and height == width:
        yield {"size": {"shortest_edge": height}}
    yield {"size": sides}


def covering(
    size: Size, mean: Sequence[float], std: Sequence[float], resample: int = 3, factor: float | None = 1 / 255
) -> Any:
    """A processor that makes squares of the middle of images; of other sides, the whole brought to them.

    Args:
        size: Height and width.
        mean, std: What is normalised by, a number for each channel.
        resample: How, by Pillow's number.
        factor: What samples of 8 bits are multiplied by; None for nothing.
    """
    transformers: Any = importlib.import_module("transformers")
    height, width = size
    square, sides = height == width, {"height": height, "width": width}
    return getattr(transformers, _COVERING)(
        size={"shortest_edge": height} if square else sides,
        crop_size=sides,
        do_center_crop=square,
        resample=resample,
        do_rescale=factor is not None,
        rescale_factor=factor or 1.0,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=len(mean) == 3,
    )
