"""Diffusion transformers of diffusers: Stable Diffusion 3, Flux, PixArt and Sana.

Blocks that attend to image and text in one softmax have two of everything, one for each stream:
`attn.q@transformer.0.img` and `attn.q@transformer.0.txt`, tagged `stream`; the keys and values meet in one
`attn.kv@transformer.0`. Flux numbers its blocks with two streams and those with one apart: `double.0.img`, `single.0`.

Time and text modulate the norms of every block and gate its sublayers: `mod.adaln` is the projection that makes shift,
scale and gate. An adapter at a sublayer's output stands inside the gate, as the sublayer itself does; its `norm_in` is
the norm before it is modulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from adapterkit.backends.diffusion import ATTENTIONS, DiffusersBackend, embedding, heads
from adapterkit.mapping.family import Attention, Fused, FusedInput, Group, Output, Weight
from adapterkit.points import Span

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

_JOINT = (Attention("attn.kv", "attn", heads),)
_IMAGE_STREAM = (
    Weight("mod.adaln", "norm1.linear"),
    Weight("attn.q", "attn.to_q"),
    Weight("attn.k", "attn.to_k"),
    Weight("attn.v", "attn.to_v"),
    Weight("attn.o", "attn.to_out.0"),
    Weight("mlp.up", "ff.net.0.proj"),
    Weight("mlp.down", "ff.net.2"),
    Output("attn", "attn.to_out.1", residual="norm1", norm_in="norm1.norm"),
    Output("mlp", "ff", residual="norm2", norm_in="norm2"),
)
_TEXT_STREAM = (
    Weight("mod.adaln", "norm1_context.linear"),
    Weight("attn.q", "attn.add_q_proj"),
    Weight("attn.k", "attn.add_k_proj"),
    Weight("attn.v", "attn.add_v_proj"),
    Weight("attn.o", "attn.to_add_out"),
    Weight("mlp.up", "ff_context.net.0.proj"),
    Weight("mlp.down", "ff_context.net.2"),
    Output("attn", "attn.to_add_out", residual="norm1_context", norm_in="norm1_context.norm"),
    Output("mlp", "ff_context", residual="norm2_context", norm_in="norm2_context"),
)
# Of the last block's text only keys and values are used: an adapter at its queries has no effect.

# Stable Diffusion 3.5's second attention of the image to itself, beside the joint one and on the same input.
_IMAGE_ALONE = (
    Weight("attn.q", "attn2.to_q"),
    Weight("attn.k", "attn2.to_k"),
    Weight("attn.v", "attn2.to_v"),
    Weight("attn.o", "attn2.to_out.0"),
    Attention("attn.kv", "attn2", heads),
    Output("attn", "attn2.to_out.1", residual="norm1", norm_in="norm1.norm"),
)

SD3 = (
    *_ENDS,
    *_CONDITIONS,
    Group("transformer_blocks.{layer}", "{layer}", _JOINT),
    Group("transformer_blocks.{layer}", "{layer}.img", _IMAGE_STREAM, {"stream": "img"}),
    Group("transformer_blocks.{layer}", "{layer}.txt", _TEXT_STREAM, {"stream": "txt"}),
    Group("transformer_blocks.{layer}", "{layer}.dual", _IMAGE_ALONE, {"stream": "img"}),
)


def _attention_and_mlp(block: nn.Module, inputs: int) -> Sequence[Span]:
    """What a single block's output projection sees: the heads' outputs, then the hidden layer of the MLP."""
    width = int(block.get_submodule("attn.to_v").out_features)  # type: ignore[arg-type]
    return Span(0, width), Span(width, inputs - width)


# Attention and MLP see the same normed stream, and one projection sums their outputs: `mlp` is the output of both.
_SINGLE = (
    Weight("mod.adaln", "norm.linear"),
    Weight("attn.q", "attn.to_q"),
    Weight("attn.k", "attn.to_k"),
    Weight("attn.v", "attn.to_v"),
    Weight("mlp.up", "proj_mlp"),
    FusedInput(("attn.o", "mlp.down"), "proj_out", split=_attention_and_mlp),
    Attention("attn.kv", "attn", heads),
    Output("mlp", "proj_out", residual="norm", norm_in="norm.norm"),
)

FLUX = (
    *_ENDS,
    *_CONDITIONS,
    Group("transformer_blocks.{layer}", "double.{layer}", _JOINT, {"stage": "double"}),
    Group("transformer_blocks.{layer}", "double.{layer}.img", _IMAGE_STREAM, {"stage": "double", "stream": "img"}),
    Group("transformer_blocks.{layer}", "double.{layer}.txt", _TEXT_STREAM, {"stage": "double", "stream": "txt"}),
    Group("single_transformer_blocks.{layer}", "single.{layer}", _SINGLE, {"stage": "single"}),
)

# One modulation for all blocks, to which each adds a table of its own. The cross-attention sees the stream as it is.
_CROSS = Output("cross", "attn2", residual="attn2")
_CAPTION = embedding("embed.text", "caption_projection", "context.")

_PIXART = (
    *_ENDS,
    *_CAPTION,
    *embedding("embed.time", "adaln_single.emb.timestep_embedder"),
    *embedding("embed.size", "adaln_single.emb.resolution_embedder", "resolution."),
    *embedding("embed.size", "adaln_single.emb.aspect_ratio_embedder", "ratio."),
    Group("", "", (Weight("mod.adaln", "adaln_single.linear"),)),
    Group(
        "transformer_blocks.{layer}",
        "{layer}",
        (
            *ATTENTIONS,
            Weight("mlp.up", "ff.net.0.proj"),
            Weight("mlp.down", "ff.net.2"),
            Output("attn", "attn1", residual="norm1", norm_in="norm1"),
            _CROSS,
            Output("mlp", "ff", residual="norm2", norm_in="norm2"),
        ),
    ),
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
            *(entry for entry in ATTENTIONS if entry.role != "attn.kv"),
            Fused(("mlp.up", "mlp.gate"), "ff.conv_inverted"),
            Weight("mlp.conv", "ff.conv_depth"),
            Weight("mlp.down", "ff.conv_point"),
            Output("attn", "attn1", residual="norm1", norm_in="norm1"),
            _CROSS,
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
    ignored: ClassVar[Mapping[str, str]] = {
        "*.fuser.*": "GLIGEN's gated layers run only where boxes are given",
    }


class SanaBackend(_TransformerBackend):
    """Sana: SanaTransformer2DModel."""

    table = _SANA
