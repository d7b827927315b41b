"""What kind of model one is, as its library tells: the word for it where it stands alone, and whether it generates."""

from __future__ import annotations

import inspect
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

_CONFIGS: Mapping[str, str] = {
    "vision_config": "vision",
    "image_config": "vision",
    "audio_config": "audio",
    "speech_config": "audio",
    "text_config": "language",
}
"""What the config of a whole model calls that of a tower -> ours for the tower."""

_MODALITIES: Mapping[str, str] = {
    "text": "language",
    "image": "vision",
    "video": "vision",
    "audio": "audio",
    "speech": "audio",
}
"""transformers' word for what a model takes -> ours for a model of nothing else."""

_SEVERAL: Mapping[frozenset[str], str] = {
    frozenset({"language", "vision"}): "vision_language",
    frozenset({"language", "audio"}): "audio_language",
}

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
            return _of_transformers(model)
        if library == "diffusers" and inside[:1] == ["models"]:
            return _DIFFUSERS.get(inside[1], "model") if len(inside) > 1 else "model"
    return "model"


def modalities(model: Any) -> frozenset[str]:
    """What a model of transformers takes: `language`, `vision`, `audio`; empty where it is none, or nothing is said."""
    config: Any = getattr(model, "config", None)
    if (own := _CONFIGS.get(_key(config))) is not None:  # a tower's class may say what the whole model takes
        return frozenset({own})
    told = getattr(model, "input_modalities", ())
    found = {_MODALITIES.get(one, one) for one in ([told] if isinstance(told, str) else told)}
    main = _INPUTS.get(str(getattr(model, "main_input_name", "")))
    if main not in (None, "language") and found == {"language"}:  # what a class has that says nothing
        found = {main}
    return frozenset(found | {_CONFIGS[key] for key in getattr(type(config), "sub_configs", ()) if key in _CONFIGS})


def tower_kind(module: Any, around: Any) -> str | None:
    """Which of the things that a model of transformers takes is what one inside it is for; None where it is no tower.

    Args:
        module: The model inside.
        around: The model.
    """
    config, whole = getattr(module, "config", None), getattr(around, "config", None)
    key = _key(config) or next((k for k in _CONFIGS if type(getattr(whole, k, None)) is type(config)), "")
    taken = modalities(around)
    if key in _CONFIGS:
        return _CONFIGS[key] if taken > {_CONFIGS[key]} else None
    own = modalities(module)
    given = inspect.signature(type(module).forward).parameters
    return next(iter(own)) if len(own) == 1 and own < taken and not _INPUTS.keys().isdisjoint(given) else None


def _key(config: object) -> str:
    """What the config of a whole model calls this one."""
    return str(getattr(type(config), "base_config_key", ""))


def _of_transformers(model: nn.Module) -> str:
    found = modalities(model)
    if len(found) == 1:
        return next(iter(found))
    return _SEVERAL.get(found, "multimodal" if found else "model")


def joins_pipelines(model: nn.Module) -> bool:
    """Whether a user who adapts a pipeline means this model too: any of diffusers or transformers.

    But not what makes images of latents, nor what looks whether they are safe.
    """
    for cls in type(model).__mro__:
        library, *inside = cls.__module__.split(".")
        if library == "diffusers":
            return inside[:2] != ["models", "autoencoders"] and inside[-1:] != ["safety_checker"]
        if library == "transformers":
            return True
    return False


def generates(model: Any) -> bool:
    """Whether it is a model of transformers that makes several rows of a sample: beams, several results."""
    can = getattr(model, "can_generate", None)
    of_text = getattr(model, "main_input_name", None) == "input_ids"
    return of_text and callable(can) and bool(can())
