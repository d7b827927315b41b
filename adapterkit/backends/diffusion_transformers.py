"""Diffusion transformers of diffusers: Stable Diffusion 3, Flux, PixArt and Sana.

Blocks that attend to image and text in one softmax have two of everything, one for each stream:
`attn.q@transformer.0.img` and `attn.q@transformer.0.txt`, tagged `stream`; the keys and values meet in one
`attn.kv@transformer.0`. Flux numbers its blocks with two streams and those with one apart: `double.0.img`, `single.0`.

Time and text modulate the norms of every block and gate its sublayers: `mod.adaln` is the projection that makes shift,
scale and gate. An adapter at a sublayer's output stands inside the gate, as the sublayer itself does; its `norm_in` is
the norm before it is modulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from torch import nn

from adapterkit.backends.diffusion import DiffusersBackend, embedding
from adapterkit.mapping.family import Block, Fused, Group, Output, Weight
from adapterkit.mapping.templates.blocks import before
from adapterkit.points import Tag

_ENDS = (
    Group("", "", (Weight("embed.patch", "pos_embed.proj|patch_embed.proj|x_embedder"), Weight("head", "proj_out"))),
    Group("", "out", (Weight("mod.adaln", "norm_out.linear"),)),
)
# Time, distilled guidance and pooled text are added up; the text's tokens become the second stream.
_CONDITIONS = (
    *embedding("embed.time", "time_text_embed.timestep_embedder"),
    *embedding("embed.guidance", "time_text_embed.guidance_embedder"),
    *embedding("embed.text", "time_text_embed.text_embedder"),
    Group("", "context", (Weight("embed.text", "context_embedder"),)),
)

_Tags = dict[str, Tag]


def _stream(stream: str, site: str, tags: _Tags, ending: str, attention: str) -> Iterator[Group]:
    """What a block has for one of its streams. `ending` is that of the stream's modules."""
    norm, tags = f"norm1{ending}", {**tags, "stream": stream}
    outputs = (
        Weight("mod.adaln", f"{norm}.linear"),
        Output("attn", attention, residual=norm, norm_in=f"{norm}.norm"),
        before("mlp", f"ff{ending}", f"norm2{ending}"),
    )
    yield Group("transformer_blocks.{layer}", f"{site}.{stream}", outputs, tags)
    yield Group(f"transformer_blocks.{{layer}}.ff{ending}", f"{site}.{stream}", (Block(),), tags)


def _joint(site: str, tags: _Tags) -> Iterator[Group]:
    """Blocks of two streams. Of the last one's text only keys and values are used: its queries have no effect."""
    yield Group("transformer_blocks.{layer}.attn", site, (Block(),), tags)
    yield from _stream("img", site, tags, "", "attn.to_out.1")
    yield from _stream("txt", site, tags, "_context", "attn.to_add_out")


# Stable Diffusion 3.5's second attention of the image to itself, beside the joint one and on the same input.
_IMAGE_ALONE = (Output("attn", "attn2.to_out.1", residual="norm1", norm_in="norm1.norm"),)

SD3 = (
    *_ENDS,
    *_CONDITIONS,
    *_joint("{layer}", {}),
    Group("transformer_blocks.{layer}.attn2", "{layer}.dual", (Block(),), {"stream": "img"}),
    Group("transformer_blocks.{layer}", "{layer}.dual", _IMAGE_ALONE, {"stream": "img"}),
)

# In a single block attention and MLP see the same normed stream, and one projection sums their outputs: `mlp` is the
# output of both.
FLUX = (
    *_ENDS,
    *_CONDITIONS,
    *_joint("double.{layer}", {"stage": "double"}),
    Group(
        "single_transformer_blocks.{layer}",
        "single.{layer}",
        (Weight("mod.adaln", "norm.linear"), Block()),
        {"stage": "single"},
    ),
)

# One modulation for all blocks, to which each adds a table of its own. The cross-attention sees the stream as it is.
_CAPTION = embedding("embed.text", "caption_projection", "context.")

_PIXART = (
    *_ENDS,
    *_CAPTION,
    *embedding("embed.time", "adaln_single.emb.timestep_embedder"),
    *embedding("embed.size", "adaln_single.emb.resolution_embedder", "resolution."),
    *embedding("embed.size", "adaln_single.emb.aspect_ratio_embedder", "ratio."),
    Group("", "", (Weight("mod.adaln", "adaln_single.linear"),)),
    Group("transformer_blocks.{layer}", "{layer}", (Block(),)),
)

# No `attn.kv`: the self-attention is linear, without a softmax that more keys could join. No `mlp` output: the
# feed-forward gives an image, the residual stream is a sequence.
_SANA = (
    *_ENDS,
    *_CAPTION,
    *embedding("embed.time", "time_embed.emb.timestep_embedder|time_embed.timestep_embedder"),
    *embedding("embed.guidance", "time_embed.guidance_embedder"),
    Group("", "", (Weight("mod.adaln", "time_embed.linear"),)),
    Group(
        "transformer_blocks.{layer}",
        "{layer}",
        (
            Block("attn.kv"),
            Fused(("mlp.up", "mlp.gate"), "ff.conv_inverted"),
            Weight("mlp.conv", "ff.conv_depth"),
            Weight("mlp.down", "ff.conv_point"),
        ),
    ),
)


class _TransformerBackend(DiffusersBackend):
    """One of the tables above."""

    component = "transformer"
    table: ClassVar[tuple[Group, ...]] = ()

    def groups(self, model: nn.Module) -> Sequence[Group]:
        return self.table


class SD3Backend(_TransformerBackend):
    """Stable Diffusion 3 and 3.5: SD3Transformer2DModel."""

    table = SD3
    ignored: ClassVar[Mapping[str, str]] = {
        "image_proj.*": "projections of image embeddings (IP-Adapter) have no role yet",
        "*.processor.*": "projections of image embeddings (IP-Adapter) have no role yet",
    }


class FluxBackend(_TransformerBackend):
    """Flux.1, dev, schnell and its relatives: FluxTransformer2DModel."""

    table = FLUX
    ignored: ClassVar[Mapping[str, str]] = {
        "encoder_hid_proj.*": "projections of image embeddings (IP-Adapter) have no role yet",
        "*.processor.*": "projections of image embeddings (IP-Adapter) have no role yet",
    }


class PixArtBackend(_TransformerBackend):
    """PixArt-alpha and PixArt-Sigma: PixArtTransformer2DModel."""

    table = _PIXART
    ignored: ClassVar[Mapping[str, str]] = {"*.fuser.*": "GLIGEN's gated layers run only where boxes are given"}


class SanaBackend(_TransformerBackend):
    """Sana: SanaTransformer2DModel."""

    table = _SANA
