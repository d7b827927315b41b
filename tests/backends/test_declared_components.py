"""Every component that an installed pipeline of diffusers declares: adapted, or left out by the rule."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from adapterkit.backend import Backend
from adapterkit.mapping.kinds import joins_pipelines
from adapterkit.plugins.manager import get_plugin_manager, instance_of

diffusers: Any = importlib.import_module("diffusers")  # its names are made when they are asked for

MEANT = ("transformer", "unet", "controlnet", "text_encoder", "image_encoder", "prior", "language_model")
"""How the names of what is adapted begin, among others."""

OUT = ("vae", "audio_vae", "vqvae", "movq", "safety_checker")
"""What pipelines call autoencoders and safety checkers."""


def pipelines() -> Iterator[type]:
    for name in dir(diffusers):
        cls = getattr(diffusers, name, None)
        if inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline):
            yield cls


def declared(cls: Any) -> Mapping[str, list[type]]:
    """Name of each component that is a module -> its classes."""
    try:
        hints = typing.get_type_hints(cls.__init__)
    except (NameError, TypeError, AttributeError):
        hints = {name: one.annotation for name, one in inspect.signature(cls.__init__).parameters.items()}
    found = {name: [*_classes(hint)] for name, hint in hints.items()}
    return {name: classes for name, classes in found.items() if classes}


def _classes(hint: Any) -> Iterator[type]:
    if inspect.isclass(hint) and not typing.get_args(hint) and issubclass(hint, nn.Module):
        yield hint
    for one in typing.get_args(hint):
        yield from _classes(one)


def without_values(cls: type) -> nn.Module:
    """An object of the class, of which nothing but that is known."""
    return object.__new__(cls)  # type: ignore[return-value]


def backend_of(cls: type) -> tuple[str, bool]:
    """The backend that maps a class, and whether models of it are components of a pipeline."""
    model = without_values(cls)
    spec = get_plugin_manager().backend_for(model)
    return spec.name, instance_of(spec, Backend).in_pipelines or joins_pipelines(model)


def test_what_makes_images_of_latents_is_no_component() -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    for cls in (diffusers.AutoencoderKLWan, StableDiffusionSafetyChecker):
        assert not joins_pipelines(without_values(cls))
    for cls in (diffusers.WanTransformer3DModel, diffusers.UNetMotionModel, diffusers.ControlNetModel):
        assert joins_pipelines(without_values(cls))


def test_a_users_own_module_is_none() -> None:
    assert not joins_pipelines(nn.Linear(2, 2))


@pytest.mark.slow
def test_every_declared_component_is_adapted_or_left_out_by_the_rule() -> None:
    told: dict[str, str] = {}
    for pipeline in pipelines():
        assert issubclass(pipeline, ConfigMixin)
        for name, classes in declared(pipeline).items():
            for cls in classes:
                backend, joins = backend_of(cls)
                told[f"{pipeline.__name__}.{name}: {cls.__name__}"] = backend if joins else "out"
                if name.startswith(MEANT) or name in OUT:
                    assert joins is (name not in OUT), f"{pipeline.__name__}.{name}: {cls.__name__}"
    assert len(told) > 300
    assert sum(backend != "out" for backend in told.values()) > 200
