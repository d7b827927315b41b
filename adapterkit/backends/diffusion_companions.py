"""What works beside a denoiser: ControlNets, and the autoencoder that makes latents.

A ControlNet is the first part of its denoiser and has its sites; `embed.cond` is the network that reads the condition,
and `proj.control` the layers that start at zero, one for each output: `proj.control@controlnet.down.3`.

The autoencoder's sites begin with its half: `res.conv1@vae.encoder.down.0.1`, `attn.q@vae.decoder.mid.0`. It takes no
part in training a denoiser, so a pipeline's autoencoder is left out: give it itself, `Adapters(pipe.vae)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from torch import nn

from adapterkit.backends.diffusion import CONDITIONS, PROJECTIONS, RESNET, DiffusersBackend, UNetBackend, heads, stage
from adapterkit.backends.diffusion_transformers import FLUX, SD3, FluxBackend, SD3Backend
from adapterkit.contract.layouts import Repeats
from adapterkit.mapping.family import Attention, Group, Weight
from adapterkit.points import InjectionPoint, Tag


def _condition(path: str) -> tuple[Group, ...]:
    """The convolutions that bring an image of the condition to the size of the latents."""
    return (
        Group(path, "in", (Weight("embed.cond", "conv_in"),)),
        Group(f"{path}.blocks.{{index}}", "{index}", (Weight("embed.cond", ""),)),
        Group(path, "out", (Weight("embed.cond", "conv_out"),)),
    )


_CONTROL = (
    *_condition("controlnet_cond_embedding"),
    Group("controlnet_down_blocks.{index}", "down.{index}", (Weight("proj.control", ""),), {"stage": "down"}),
    Group("", "mid", (Weight("proj.control", "controlnet_mid_block"),), {"stage": "mid"}),
)


class ControlNetBackend(DiffusersBackend):
    """diffusers' ControlNetModel, which conditions a UNet."""

    component = "controlnet"
    ignored: ClassVar[Mapping[str, str]] = UNetBackend.ignored

    def groups(self, model: nn.Module) -> Sequence[Group]:
        return [
            *CONDITIONS,
            *_CONTROL,
            *stage("down", "down_blocks.{block}", "down.{block}"),
            *stage("mid", "mid_block", "mid"),
        ]


class SD3ControlNetBackend(SD3Backend):
    """diffusers' SD3ControlNetModel; some have no text, and blocks of one stream."""

    component = "controlnet"
    table = (
        *SD3,
        Group("", "", (Weight("embed.cond", "pos_embed_input.proj"),)),
        Group("controlnet_blocks.{layer}", "{layer}", (Weight("proj.control", ""),)),
    )


class FluxControlNetBackend(FluxBackend):
    """diffusers' FluxControlNetModel, for one condition or for several modes."""

    component = "controlnet"
    table = (
        *FLUX,
        *_condition("input_hint_block"),
        Group(
            "", "", (Weight("embed.cond", "controlnet_x_embedder"), Weight("embed.mode", "controlnet_mode_embedder"))
        ),
        Group("controlnet_blocks.{layer}", "double.{layer}", (Weight("proj.control", ""),), {"stage": "double"}),
        Group("controlnet_single_blocks.{layer}", "single.{layer}", (Weight("proj.control", ""),), {"stage": "single"}),
    )


def _half(half: str) -> Iterator[Group]:
    """The groups of the encoder or the decoder. Its attention norms and adds by itself: no `output` point fits."""
    for name, blocks, site in (
        ("down", f"{half}.down_blocks.{{block}}", f"{half}.down.{{block}}"),
        ("mid", f"{half}.mid_block", f"{half}.mid"),
        ("up", f"{half}.up_blocks.{{block}}", f"{half}.up.{{block}}"),
    ):
        tags: dict[str, Tag] = {"half": half, "stage": name}
        attention = (*PROJECTIONS, Attention("attn.kv", "", heads))
        yield Group(f"{blocks}.resnets.{{index}}", f"{site}.{{index}}", RESNET, tags)
        yield Group(f"{blocks}.attentions.{{index}}", f"{site}.{{index}}", attention, tags)
        for sampler, role in (("downsamplers.0", "down.conv"), ("upsamplers.0", "up.conv")):
            yield Group(f"{blocks}.{sampler}", site, (Weight(role, "conv"),), tags)


_AUTOENCODER = (
    Group("encoder", "encoder", (Weight("embed.patch", "conv_in"), Weight("head", "conv_out")), {"half": "encoder"}),
    Group("", "encoder", (Weight("proj.out", "quant_conv"),), {"half": "encoder"}),
    Group("", "decoder", (Weight("proj.in", "post_quant_conv"),), {"half": "decoder"}),
    Group("decoder", "decoder", (Weight("embed.patch", "conv_in"), Weight("head", "conv_out")), {"half": "decoder"}),
    *_half("encoder"),
    *_half("decoder"),
)


class AutoencoderBackend(DiffusersBackend):
    """diffusers' AutoencoderKL."""

    component = "vae"
    in_pipelines = False
    ignored: ClassVar[Mapping[str, str]] = {"*.Conv2d_0": "a second name of `conv` in old samplers"}

    def groups(self, model: nn.Module) -> Sequence[Group]:
        return _AUTOENCODER

    def repeats(self, model: nn.Module, point: InjectionPoint) -> Repeats | None:
        return None
