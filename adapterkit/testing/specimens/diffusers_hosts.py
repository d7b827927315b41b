"""Models of diffusers that are run inside another one, which has their modules: what runs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from adapterkit.testing.specimens.diffusers_configs import shrunk_arguments
from adapterkit.testing.specimens.specimen import strengthened


def host_of(model: nn.Module) -> nn.Module:
    """The model to call so that this small one runs; itself for most."""
    make = next((_HOSTS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _HOSTS), None)
    return model if make is None else make(model)


def _unet_of_motion(adapter: Any) -> nn.Module:
    """A UNet of videos with the adapter's own motion modules in it."""
    unet = _small("UNetMotionModel")
    blocks = [*adapter.down_blocks, adapter.mid_block, *adapter.up_blocks]
    for block, given in zip([*unet.down_blocks, unet.mid_block, *unet.up_blocks], blocks, strict=True):
        block.motion_modules = given.motion_modules
    return unet


def _with_shared_modules(controlnet: Any) -> nn.Module:
    """The ControlNet, which takes what it lacks from a transformer."""
    controlnet.gradient_checkpointing = False  # which diffusers reads, and has not set
    return type(controlnet).from_transformer(controlnet, _small("ZImageTransformer2DModel"))


def _small(name: str) -> Any:
    cls = getattr(importlib.import_module("diffusers"), name)
    with torch.device("meta"):
        whole = cls()
    return strengthened(cls(**shrunk_arguments(whole)))


_HOSTS: Mapping[str, Callable[[Any], nn.Module]] = {
    "MotionAdapter": _unet_of_motion,
    "ZImageControlNetModel": _with_shared_modules,
}
