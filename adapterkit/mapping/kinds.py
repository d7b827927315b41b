"""What kind of model one is, as its library tells: the word for it where it stands alone, and whether it generates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_INPUTS: Mapping[str, str] = {
    "input_ids": "language",
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "input_features": "audio",
    "input_values": "audio",
}
"""transformers' word for a model's main input -> ours for the model."""

_DIFFUSERS: Mapping[str, str] = {
    "transformers": "transformer",
    "unets": "unet",
    "controlnets": "controlnet",
    "autoencoders": "vae",
}
"""Where in diffusers.models a class is -> what pipelines call it."""


def component_of(model: nn.Module) -> str:
    """`language`, `vision`, `audio`, `transformer`, `unet`, ...; `model` where no library tells."""
    for cls in type(model).__mro__:
        library, *inside = cls.__module__.split(".")
        if library == "timm":
            return "vision"
        if library == "transformers":
            return _INPUTS.get(str(getattr(model, "main_input_name", "")), "model")
        if library == "diffusers" and inside[:1] == ["models"]:
            return _DIFFUSERS.get(inside[1], "model") if len(inside) > 1 else "model"
    return "model"


def generates(model: Any) -> bool:
    """Whether it is a model of transformers that makes several rows of a sample: beams, several results."""
    can = getattr(model, "can_generate", None)
    of_text = getattr(model, "main_input_name", None) == "input_ids"
    return of_text and callable(can) and bool(can())
