"""Models of diffusers that no table here is about: their layers as they stand, with the roles that names tell."""

from __future__ import annotations

from adapterkit.backends.generic import GenericBackend


class OtherTransformerBackend(GenericBackend):
    """Whatever else of diffusers takes LoRA: Qwen-Image, Z-Image, Wan, Flux.2, Lumina 2, ..."""

    component = "transformer"
    in_pipelines = True


class OtherUNetBackend(GenericBackend):
    """UNets that are none of Stable Diffusion's: of video, of motion."""

    component = "unet"
    in_pipelines = True
