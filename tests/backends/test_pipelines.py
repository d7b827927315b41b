"""Whole pipelines: one handle on several components."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import adapterkit as ak
from tests.backends import vision_checks as checks
from tests.backends import vision_models as models


@pytest.fixture(scope="module")
def base_pipeline(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return models.pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pipe(base_pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    parts = {name: copy.deepcopy(part) for name, part in base_pipeline.components.items()}
    fresh = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    fresh.set_progress_bar_config(disable=True)
    return fresh


def test_a_pipeline_is_one_model_with_components(pipe: StableDiffusionPipeline) -> None:
    assert {point.component for point in ak.points(pipe)} == {"unet", "text_encoder"}
    assert len(ak.points(pipe, "@component=unet fused.*@component=unet")) == len(ak.points(pipe.unet))
    assert ak.points(pipe, "attn.q@component=text_encoder").ids == ["attn.q@text_encoder.0", "attn.q@text_encoder.1"]


@pytest.mark.parametrize(
    "config",
    [
        ak.LoRA(rank=2, targets="attn.* cross.* mlp.* proj.* res.*"),
        ak.Bottleneck(width=3, targets="attn mlp cross"),
        ak.Prefix(length=3, init_std=1.0, targets="attn.kv cross.kv"),
    ],
    ids=["lora", "bottleneck", "prefix"],
)
def test_one_handle_adapts_text_encoder_and_unet(pipe: StableDiffusionPipeline, config: ak.AdapterConfig) -> None:
    base = models.draw(pipe)
    before = [checks.snapshot(model) for model in (pipe.unet, pipe.text_encoder)]
    adapters = ak.Adapters(pipe)
    adapters.add("a", config)
    checks.randomise(adapters)
    assert {key.partition("@")[2].partition(".")[0] for key in adapters.modules("a")} == {"unet", "text_encoder"}
    adapted = models.draw(pipe)
    assert not torch.allclose(adapted, base, atol=1e-3)
    with adapters.disabled():
        assert torch.equal(models.draw(pipe), base)
    assert torch.equal(models.draw(pipe), adapted)
    adapters.detach()
    assert torch.equal(models.draw(pipe), base)
    for model, snapshot in zip((pipe.unet, pipe.text_encoder), before, strict=True):
        checks.assert_restored(model, snapshot)


def test_both_components_have_their_share_of_the_image(pipe: StableDiffusionPipeline) -> None:
    adapters = ak.Adapters(pipe)
    base = models.draw(pipe)
    images = []
    for component in ("unet", "text_encoder"):
        adapters.add(component, ak.LoRA(rank=2, targets=f"attention@component={component}"))
        checks.randomise(adapters, component)
        images.append(models.draw(pipe))
        assert not torch.allclose(images[-1], base, atol=1e-4)
    assert not torch.allclose(*images, atol=1e-4)


def test_merged_images_are_the_adapters(pipe: StableDiffusionPipeline) -> None:
    adapters = ak.Adapters(pipe)
    adapters.add("a", ak.LoRA(rank=2, targets="linear res.*"))
    checks.randomise(adapters, scale=0.1)
    adapted = models.draw(pipe)
    with adapters.merged():
        assert torch.allclose(models.draw(pipe), adapted, atol=1e-4)
    assert torch.equal(models.draw(pipe), adapted)


def test_xl_has_two_text_encoders(tmp_path: Path) -> None:
    pipe = models.pipeline_xl(tmp_path)
    base = models.draw(pipe)
    adapters = ak.Adapters(pipe)
    adapters.add("a", ak.LoRA(rank=2, targets="attention"))
    checks.randomise(adapters)
    components = {point.component for point in adapters.points()}
    assert components == {"unet", "text_encoder", "text_encoder_2"}
    assert {"attn.q@text_encoder_2.1", "cross.k@unet.mid.0.1"} <= set(adapters.modules("a"))
    assert not torch.allclose(models.draw(pipe), base, atol=1e-3)
    adapters.detach()
    assert torch.equal(models.draw(pipe), base)
