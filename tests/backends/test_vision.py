"""Where the points of vision transformers are."""

from __future__ import annotations

import time
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

import adapterkit as ak
from adapterkit.backends.vision import TimmViTBackend, ViTBackend
from adapterkit.points import Span
from tests.backends import vision_checks as checks
from tests.backends import vision_models as models
from tests.backends.own import own
from tests.backends.vit_variants import TIMM, classify, vit

BLOCK = ["attn.kv", "attn.q", "attn.k", "attn.v", "attn.o", "attn", "mlp.up", "mlp.down", "mlp"]
HF_BLOCK = ["attn", "attn.kv", "attn.q", "attn.k", "attn.v", "attn.o", "mlp", "mlp.up", "mlp.down"]


def ids_of(backend: Any, model: nn.Module) -> list[str]:
    return [point.id for point in own(backend.points(model, "vision"))]


# --- where the points are --------------------------------------------------------------------------------------------


def in_layers(roles: list[str], layers: int = models.LAYERS) -> list[str]:
    return [f"{role}@vision.{layer}" for layer in range(layers) for role in roles]


def test_ids_of_timm() -> None:
    expected = ["embed.patch@vision", "tokens@vision", *in_layers(BLOCK), "head@vision"]
    assert ids_of(TimmViTBackend(), models.timm_vit()) == expected
    assert ids_of(TimmViTBackend(), models.timm_vit(VisionTransformerDistilled)) == [*expected, "head@vision.dist"]


def test_ids_of_parallel_branches() -> None:
    attention = [f"{role}@vision.0.{branch}" for branch in (0, 1) for role in BLOCK[:6]]
    feed_forward = [f"{role}@vision.0.{branch}" for branch in (0, 1) for role in BLOCK[6:]]
    model = models.timm_vit(depth=1, block_fn=ParallelThingsBlock)
    assert ids_of(TimmViTBackend(), model)[2:-1] == [*attention, *feed_forward]


def test_ids_of_parallel_sublayers() -> None:
    model = models.timm_vit(depth=1, block_fn=ParallelScalingBlock)
    expected = ["mlp.up", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.down", "block"]
    assert ids_of(TimmViTBackend(), model)[2:-1] == in_layers(expected, 1)
    spans = {p.role: p.span for p in own(TimmViTBackend().points(model, "vision")) if p.span}
    up = 4 * models.WIDTH
    assert spans == {
        "mlp.up": Span(0, up),
        "attn.q": Span(up, 8),
        "attn.k": Span(up + 8, 8),
        "attn.v": Span(up + 16, 8),
    }


def test_ids_of_vit() -> None:
    stem = ["tokens@vision", "embed.patch@vision"]
    assert ids_of(ViTBackend(), vit()) == [*stem, *in_layers(HF_BLOCK), "head@vision"]
    assert ids_of(ViTBackend(), vit(ViTModel)) == [*stem, *in_layers(HF_BLOCK), "head.pooler@vision"]
    assert ids_of(ViTBackend(), vit(ViTForMaskedImageModeling, encoder_stride=4)) == [
        *stem,
        *in_layers(HF_BLOCK),
        "head@vision",
    ]


def test_ids_of_vit_in_transformers_4() -> None:
    new = vit()
    old = models.OldViT(new)
    assert torch.allclose(classify(old), classify(new), atol=1e-6)
    points = {p.id: p for p in own(ViTBackend().points(old, "vision"))}
    same = {p.id: p for p in own(ViTBackend().points(new, "vision"))}
    assert set(points) == set(same)
    assert {key: (p.shape, p.tags, p.kind) for key, p in points.items()} == {
        key: (p.shape, p.tags, p.kind) for key, p in same.items()
    }
    assert points["attn.kv@vision.1"].path == "vit.encoder.layer.1.attention.attention"
    for key in points:
        if points[key].kind == "weight":
            assert old.get_submodule(points[key].path) is new.get_submodule(same[key].path)


@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
def test_every_layer_of_timm_is_mapped(options: dict[str, Any]) -> None:
    model = models.timm_vit(**options)
    points = own(TimmViTBackend().points(model, "vision"))
    assert checks.unmapped(TimmViTBackend(), model) == []
    assert len({p.id for p in points}) == len(points)
    order = [name for name, _ in model.named_modules()]
    assert [order.index(p.path) for p in points] == sorted(order.index(p.path) for p in points)


@pytest.mark.parametrize("cls", [ViTModel, ViTForImageClassification, ViTForMaskedImageModeling])
def test_every_layer_of_vit_is_mapped(cls: type) -> None:
    assert checks.unmapped(ViTBackend(), vit(cls, encoder_stride=4)) == []


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_so400m_patch14_siglip_224", "deit3_small_patch16_224"])
def test_real_models_on_meta(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    start = time.perf_counter()
    points = own(TimmViTBackend().points(model, "vision"))
    assert time.perf_counter() - start < 1
    assert len({p.id for p in points}) == len(points) > 9 * len(model.blocks)
    assert checks.unmapped(TimmViTBackend(), model) == []


def test_hybrid_convolutions_are_ignored_for_a_reason() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_r_s16_p8_224")
    assert checks.unmapped(TimmViTBackend(), model) == []
    paths = [p.path for p in own(TimmViTBackend().points(model, "vision"))]
    assert "patch_embed.proj" in paths
    assert not [path for path in paths if path.startswith("patch_embed.backbone")]
    assert all(TimmViTBackend.ignored.values())


def test_presets_leave_head_and_embeddings_alone() -> None:
    for model in (models.timm_vit(global_pool="map"), vit(ViTModel)):
        for preset in ("all", "linear", "attention"):
            chosen = ak.points(model, preset)
            assert len(chosen) > 0
            assert not [p.id for p in chosen if p.role.startswith(("head", "embed"))]


def test_tags_select_layers() -> None:
    assert ak.points(models.timm_vit(), "attn.{q,v}@layer>=1").ids == ["attn.q@vision.1", "attn.v@vision.1"]


@pytest.mark.parametrize(("layer", "first"), [(GluMlp, "mlp.up"), (SwiGLUPacked, "mlp.gate")])
def test_gate_and_value_are_told_apart(layer: Any, first: str) -> None:
    """The value's rows scale the hidden state: doubling them (and their bias) doubles it, unlike the gate's."""
    model = models.timm_vit(depth=1, mlp_layer=layer)
    spans = {p.role: p.span for p in own(TimmViTBackend().points(model, "vision")) if p.role in ("mlp.up", "mlp.gate")}
    assert spans[first] == Span(0, 2 * models.WIDTH)
    mlp = model.blocks[0].mlp
    seen: list[Tensor] = []
    mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(models.images())
    rows = slice(spans["mlp.up"].start, spans["mlp.up"].start + spans["mlp.up"].size)
    with torch.no_grad():
        mlp.fc1.weight[rows] *= 2
        mlp.fc1.bias[rows] *= 2
    model(models.images())
    assert torch.allclose(seen[1], 2 * seen[0])
