"""Whole pipelines of diffusion transformers and ControlNets: one handle on what they generate with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import adapterkit as ak
from adapterkit.errors import TargetNotFoundError
from tests.backends import diffusion_models as models
from tests.backends import vision_checks as checks
from tests.backends import vision_models

CONFIGS = {
    "lora": ak.LoRA(rank=2, targets="attn.* mlp.*"),
    "bottleneck": ak.Bottleneck(width=3, targets="attn mlp"),
    "prefix": ak.Prefix(length=3, init_std=1.0, targets="attn.kv"),
}


def clip(cls: Any = CLIPTextModel) -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(**sizes, vocab_size=20, projection_dim=8, bos_token_id=18, eos_token_id=19, pad_token_id=1)
    return models.frozen(cls(config))


def t5() -> T5EncoderModel:
    sizes = {"d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    return models.frozen(T5EncoderModel(T5Config(**sizes)))


def flux() -> FluxPipeline:
    """Flux packs 2 x 2 pixels of a latent into one token."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=models.autoencoder(latent_channels=1, shift_factor=0.0),
        text_encoder=clip(),
        tokenizer=None,
        text_encoder_2=t5(),
        tokenizer_2=None,
        transformer=models.flux(),
    )


def sd3() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=models.autoencoder(shift_factor=0.0),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=None,
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=None,
        text_encoder_3=t5(),
        tokenizer_3=None,
        transformer=models.sd3(),
    )


PIPELINES = {"flux": (flux, 3), "sd3": (sd3, 4)}


def draw(pipe: Any) -> Tensor:
    """An image from fixed embeddings of a text."""
    generator = torch.Generator().manual_seed(8)
    text, pooled = (
        torch.randn(1, 5, models.TEXT, generator=generator),
        torch.randn(1, models.POOLED, generator=generator),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        num_inference_steps=2,
        height=8,
        width=8,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images


@pytest.mark.parametrize("name", PIPELINES)
def test_the_denoiser_and_all_text_encoders_are_components_and_the_autoencoder_is_not(name: str) -> None:
    make, count = PIPELINES[name]
    encoders = {f"text_encoder_{i}" if i > 1 else "text_encoder" for i in range(1, count)}
    pipe = make()
    assert {point.component for point in ak.points(pipe)} == {"transformer", *encoders}
    assert {point.component for point in ak.points(pipe, "all")} == {"transformer", *encoders}
    assert ak.points(pipe, "@component=transformer") == ak.points(pipe.transformer)
    with pytest.raises(TargetNotFoundError, match="component is one of"):
        ak.points(pipe, "attn.q@component=vae")
    assert {point.component for point in ak.points(pipe.vae)} == {"vae"}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", PIPELINES)
def test_sampling_with_an_adapter(name: str, kind: str) -> None:
    pipe: Any = PIPELINES[name][0]()
    base = draw(pipe)
    before = [checks.snapshot(model) for model in (pipe.transformer, pipe.vae)]
    adapters = ak.Adapters(pipe)
    adapters.add("a", CONFIGS[kind])
    checks.randomise(adapters)
    adapted = draw(pipe)
    assert not torch.allclose(adapted, base, atol=1e-3)
    if kind == "lora":
        with adapters.merged():
            assert torch.allclose(draw(pipe), adapted, atol=1e-5)
    with adapters.disabled():
        assert torch.equal(draw(pipe), base)
    adapters.detach()
    assert torch.equal(draw(pipe), base)
    for model, state in zip((pipe.transformer, pipe.vae), before, strict=True):
        checks.assert_restored(model, state)


def test_the_autoencoder_of_a_pipeline_is_adapted_by_itself() -> None:
    pipe = flux()
    base = draw(pipe)
    vae, denoiser = ak.Adapters(pipe.vae), ak.Adapters(pipe)
    vae.add("decoder", ak.LoRA(rank=2, targets="res.*@half=decoder"))
    checks.randomise(vae, "decoder")
    decoded = draw(pipe)
    assert not torch.allclose(decoded, base, atol=1e-3)
    denoiser.add("a", CONFIGS["lora"])
    denoiser.remove("a")
    assert torch.equal(draw(pipe), decoded)
    vae.detach()
    assert torch.equal(draw(pipe), base)


def test_a_controlnet_is_a_component(tmp_path: Path) -> None:
    plain = vision_models.pipeline(tmp_path)
    parts = {name: copy.deepcopy(part) for name, part in plain.components.items()}
    controlnet = models.controlnet(cross_attention_dim=vision_models.CONTEXT)
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=controlnet, requires_safety_checker=False)
    pipe.unet.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)

    def guided() -> Tensor:
        condition = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(5)
        made = pipe("one red circle", condition, num_inference_steps=2, generator=generator, output_type="pt")
        return made.images

    assert {point.component for point in ak.points(pipe)} == {"unet", "text_encoder", "controlnet"}
    base = guided()
    adapters = ak.Adapters(pipe)
    adapters.add("a", ak.LoRA(rank=2, targets="@component=controlnet"))
    checks.randomise(adapters)
    assert not torch.allclose(guided(), base, atol=1e-3)
    adapters.detach()
    assert torch.equal(guided(), base)
