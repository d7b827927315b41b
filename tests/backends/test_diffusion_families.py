"""Diffusion transformers, ControlNets and autoencoders of diffusers: where their points are."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

import adapterkit as ak
from adapterkit.backends.diffusion import DiffusersBackend
from adapterkit.backends.diffusion_companions import (
    AutoencoderBackend,
    ControlNetBackend,
    FluxControlNetBackend,
    SD3ControlNetBackend,
)
from adapterkit.backends.diffusion_transformers import FluxBackend, PixArtBackend, SanaBackend, SD3Backend
from adapterkit.points import AttentionLayout, Span
from tests.backends import diffusion_models as models
from tests.backends import vision_checks as checks
from tests.backends.own import own

BACKENDS: dict[str, type[DiffusersBackend]] = {
    "sd3": SD3Backend,
    "flux": FluxBackend,
    "pixart": PixArtBackend,
    "sana": SanaBackend,
    "controlnet": ControlNetBackend,
    "sd3_controlnet": SD3ControlNetBackend,
    "flux_controlnet": FluxControlNetBackend,
    "autoencoder": AutoencoderBackend,
}
EVERY = pytest.mark.parametrize("name", BACKENDS)

STREAM = ["mod.adaln", "attn", "attn.q", "attn.k", "attn.v", "attn.o", "mlp", "mlp.up", "mlp.down"]
SELF = ["attn.kv", "attn", "attn.q", "attn.k", "attn.v", "attn.o"]
CROSS = ["cross.kv", "cross", "cross.q", "cross.k", "cross.v", "cross.o"]
RES = ["res.conv1", "res.conv2"]

Sites = list[tuple[str, list[str]]]
BLOCKS = range(2)
TIME: Sites = [("1", ["embed.time"]), ("2", ["embed.time"])]
CAPTION: Sites = [("context.1", ["embed.text"]), ("context.2", ["embed.text"])]
JOINT: Sites = [*TIME, ("", ["embed.patch"]), *((site, ["embed.text"]) for site in ("1", "2", "context"))]
JOINT_ENDS: Sites = [*JOINT, ("", ["head"]), ("out", ["mod.adaln"])]
SINGLE = ["attn.kv", *(role for role in STREAM if role != "attn")]
UNET_BLOCK = [*SELF, *CROSS, "mlp", "mlp.up", "mlp.gate", "mlp.down"]
BARE = [role for role in SELF if role != "attn"]
SITES: dict[str, Sites] = {
    "sd3": [
        *JOINT_ENDS,
        ("0", ["attn.kv"]),
        ("0.img", STREAM),
        ("0.txt", STREAM),
        ("0.dual", SELF),
        ("1", ["attn.kv"]),
        ("1.img", STREAM),
        ("1.txt", ["mod.adaln", "attn.q", "attn.k", "attn.v"]),
    ],
    "flux": [
        *JOINT_ENDS,
        *((site, ["embed.guidance"]) for site in ("1", "2")),
        *((f"double.{i}", ["attn.kv"]) for i in BLOCKS),
        *((f"double.{i}.{stream}", STREAM) for i in BLOCKS for stream in ("img", "txt")),
        *((f"single.{i}", SINGLE) for i in BLOCKS),
    ],
    "pixart": [
        *TIME,
        *CAPTION,
        ("", ["embed.patch", "mod.adaln", "head"]),
        *((f"{what}.{i}", ["embed.size"]) for what in ("resolution", "ratio") for i in (1, 2)),
        *((f"{i}", [*SELF, *CROSS, "mlp", "mlp.up", "mlp.down"]) for i in BLOCKS),
    ],
    "sana": [
        *TIME,
        *CAPTION,
        ("", ["embed.patch", "mod.adaln", "head"]),
        *((f"{i}", [*SELF[1:], *CROSS, "mlp.up", "mlp.gate", "mlp.conv", "mlp.down"]) for i in BLOCKS),
    ],
    "controlnet": [
        *TIME,
        ("", ["embed.patch"]),
        *((site, ["embed.cond"]) for site in ("in", "0", "1", "out")),
        *((site, ["proj.control"]) for site in ("down.0", "down.1", "down.2", "down.3", "mid")),
        ("down.0", ["down.conv"]),
        ("down.0.0", ["proj.in", "proj.out", *RES, "res.time"]),
        ("down.0.0.0", UNET_BLOCK),
        ("down.1.0", [*RES, "res.time", "res.shortcut"]),
        ("mid.0", ["proj.in", "proj.out", *RES, "res.time"]),
        ("mid.0.0", UNET_BLOCK),
        ("mid.1", [*RES, "res.time"]),
    ],
    "sd3_controlnet": [
        *JOINT,
        ("", ["embed.cond"]),
        *((f"{i}", ["attn.kv", "proj.control"]) for i in BLOCKS),
        *((f"{i}.{stream}", STREAM) for i in BLOCKS for stream in ("img", "txt")),
    ],
    "flux_controlnet": [
        *JOINT,
        ("", ["embed.cond", "embed.mode"]),
        ("double.0", ["attn.kv", "proj.control"]),
        ("double.0.img", STREAM),
        ("double.0.txt", STREAM),
        ("single.0", [*SINGLE, "proj.control"]),
    ],
    "autoencoder": [
        ("encoder", ["embed.patch", "head", "proj.out"]),
        ("encoder.down.0", ["down.conv"]),
        ("encoder.down.0.0", RES),
        ("encoder.down.1.0", [*RES, "res.shortcut"]),
        ("encoder.mid.0", [*RES, *BARE]),
        ("encoder.mid.1", RES),
        ("decoder", ["embed.patch", "head", "proj.in"]),
        ("decoder.mid.0", [*RES, *BARE]),
        ("decoder.mid.1", RES),
        ("decoder.up.0.0", RES),
        ("decoder.up.0.1", RES),
        ("decoder.up.0", ["up.conv"]),
        ("decoder.up.1.0", [*RES, "res.shortcut"]),
        ("decoder.up.1.1", RES),
    ],
}

# Relatives of which every layer must be accounted for.
RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd 3.0": ("sd3", {"dual_attention_layers": (), "qk_norm": None}),
    "flux schnell": ("flux", {"guidance_embeds": False}),
    "pixart sigma": ("pixart", {"use_additional_conditions": False}),
    "pixart with boxes": ("pixart", {"attention_type": "gated"}),
    "sana sprint": ("sana", {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}),
    "controlnet of sdxl": (
        "controlnet",
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 4 * 6 + 12,
            "use_linear_projection": True,
        },
    ),
    "controlnet with classes": ("controlnet", {"num_class_embeds": 5}),
    "controlnet of sd3 without text": ("sd3_controlnet", {"joint_attention_dim": None}),
    "controlnet of flux with an image": ("flux_controlnet", {"conditioning_embedding_channels": 4, "num_mode": None}),
    "autoencoder of flux": ("autoencoder", {"use_quant_conv": False, "use_post_quant_conv": False}),
    "autoencoder without attention": ("autoencoder", {"mid_block_add_attention": False}),
}

# The published models, from their model cards' configs: options, points, modules with a weight, attentions.
# A double block of Flux has 19 points (14 weights), a single block 9 (6); the last block of SD3 has 14 (11), and a
# second attention 6 (4) more.
REAL: dict[str, tuple[type, dict[str, Any], int, int, int]] = {
    "flux dev": (FluxTransformer2DModel, {"guidance_embeds": True}, 713, 504, 57),
    "sd 3.5 medium": (
        SD3Transformer2DModel,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
            "pos_embed_max_size": 96,
        },
        537,
        393,
        37,
    ),
    "pixart sigma": (
        PixArtTransformer2DModel,
        {"caption_channels": 4096, "sample_size": 64, "use_additional_conditions": False},
        427,
        287,
        56,
    ),
    "sana 1.6b": (SanaTransformer2DModel, {}, 307, 227, 20),
    "controlnet of sd 1.5": (ControlNetModel, {"cross_attention_dim": 768}, 185, 143, 14),
    "autoencoder of sd": (
        AutoencoderKL,
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
        },
        74,
        72,
        2,
    ),
}


def made(name: str, **options: Any) -> tuple[Any, DiffusersBackend]:
    return models.FAMILIES[name](**options), BACKENDS[name]()


@EVERY
def test_ids(name: str) -> None:
    model, backend = made(name)
    expected = [f"{role}@{backend.component}.{site}".rstrip(".") for site, roles in SITES[name] for role in roles]
    assert sorted(point.id for point in backend.points(model, backend.component)) == sorted(expected)


@EVERY
def test_every_layer_has_a_point_and_no_point_two_meanings(name: str) -> None:
    model, backend = made(name)
    points = backend.points(model, backend.component)
    assert checks.unmapped(backend, model) == []
    assert len({(point.path, point.kind, point.span, point.in_span) for point in points}) == len(points)
    assert own(ak.points(model)).ids == [point.id for point in points]
    mapped = {point.path for point in points if point.kind == "weight"}
    layers = {
        path for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
    }
    assert mapped == layers  # the ignore list hides nothing of the plain model


@pytest.mark.parametrize(("name", "options"), RELATIVES.values(), ids=RELATIVES)
def test_every_layer_of_the_relatives_is_accounted_for(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model, backend = made(name, **options)
    points = backend.points(model, "x")
    assert checks.unmapped(backend, model) == []
    assert len({point.id for point in points}) == len(points)
    assert all(backend.ignored.values())


@pytest.mark.parametrize(("cls", "options", "count", "weights", "attentions"), REAL.values(), ids=REAL)
def test_true_shapes_on_meta(cls: Any, options: dict[str, Any], count: int, weights: int, attentions: int) -> None:
    with torch.device("meta"):
        model = cls(**options)
    start = time.perf_counter()
    points = own(ak.points(model))
    assert time.perf_counter() - start < 5  # machines differ; what grows with the square takes minutes
    assert len(points) == len({point.id for point in points}) == count
    assert len({point.path for point in points if point.kind == "weight"}) == weights
    assert sum(point.kind == "attention" for point in points) == attentions


def test_shapes_of_flux() -> None:
    with torch.device("meta"):
        points = {point.id: point for point in ak.points(FluxTransformer2DModel())}
    output, hidden = points["attn.o@transformer.single.37"], points["mlp.down@transformer.single.37"]
    assert (output.shape, hidden.shape) == ((3072, 3072), (3072, 12288))
    assert (output.in_span, hidden.in_span) == (Span(0, 3072), Span(3072, 12288))
    assert points["mod.adaln@transformer.double.18.txt"].shape == (18432, 3072)
    assert points["attn.kv@transformer.double.0"].layout == AttentionLayout(kv_heads=24, head_dim=128)
    assert points["mlp@transformer.single.0"].shape == points["attn@transformer.double.0.txt"].shape == (3072, 3072)
    assert points["embed.text@transformer.context"].shape == (3072, 4096)


@EVERY
def test_presets_leave_both_ends_and_embeddings_alone(name: str) -> None:
    model, _ = made(name)
    for preset in ("all", "linear", "attention"):
        roles = {point.role for point in ak.points(model, preset)}
        assert roles
        assert not [role for role in roles if role.startswith(("head", "embed"))]


def test_tags_select_streams_and_blocks() -> None:
    flux, sd3 = models.flux(), models.sd3()
    assert ak.points(flux, "attn.q@stream=txt").ids == [f"attn.q@transformer.double.{i}.txt" for i in range(2)]
    assert ak.points(flux, "attn.q@stage=single,layer=1").ids == ["attn.q@transformer.single.1"]
    assert ak.points(flux, "attn.kv").ids == [
        f"attn.kv@transformer.{stage}.{i}" for stage in ("double", "single") for i in range(2)
    ]
    assert ak.points(sd3, "attn.q@stream=img").ids == [
        f"attn.q@transformer.{site}" for site in ("0.img", "0.dual", "1.img")
    ]
    assert ak.points(models.autoencoder(), "attn.q@half=decoder").ids == ["attn.q@vae.decoder.mid.0"]
