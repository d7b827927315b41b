"""Losses of batches: what is added to noise, what the base teaches, in float64 where it is a formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.training.diffusion.learning import Learning
from adapterkit.training.diffusion.options import Options
from adapterkit.training.diffusion.recipes.unet import StableDiffusion
from adapterkit.training.diffusion.texts import Texts
from tests.backends.vision_models import pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    return pipeline(tmp_path_factory.mktemp("words"))


def learning(pipe: Any, **options: Any) -> Learning:
    told = Options(**options)
    recipe = StableDiffusion(pipe, told)
    return Learning(recipe, told, torch.float32, Texts(recipe, list, CPU, live=False))


def batch(rows: int = 3, **given: Any) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(4)
    return {
        "latents": torch.randn(rows, 4, 8, 8, generator=noise),
        "noise": torch.randn(rows, 4, 8, 8, generator=noise),
        "u": torch.linspace(0.1, 0.9, rows),
        "caption": ["one red circle", "two blue", ""][:rows],
        "weight": torch.ones(rows),
        "prior": torch.zeros(rows, dtype=torch.bool),
        **given,
    }


def predicted(pipe: Any, given: dict[str, Any], noise: Tensor, captions: list[str] | None = None) -> Tensor:
    """What the UNet says of the noisy latents by the schedule's formula."""
    times = (given["u"] * 1000).long()
    kept = torch.cumprod(1 - pipe.scheduler.betas.double(), 0)[times].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * given["latents"].double() + (1 - kept).sqrt() * noise.double()
    states, _ = pipe.encode_prompt(captions or given["caption"], CPU, 1, False)
    with torch.no_grad():
        return pipe.unet(noisy.float(), times, states).sample.double()


def errors(found: Tensor, target: Tensor) -> Tensor:
    return ((found - target.double()) ** 2).flatten(1).mean(1)


@torch.no_grad()
def test_weights_of_examples_and_masks_count(pipe: Any):
    mask = torch.zeros(3, 1, 8, 8)
    mask[:, :, 2:5, 1:7] = 1
    given = batch(weight=torch.tensor([1.0, 0.5, 0.0]), mask=mask)
    off = (predicted(pipe, given, given["noise"]) - given["noise"]) ** 2
    expected = (off[:, :, 2:5, 1:7].flatten(1).mean(1) * torch.tensor([1.0, 0.5, 0.0])).mean()
    assert learning(pipe).loss(given).item() == pytest.approx(expected.item(), rel=1e-4)


@torch.no_grad()
def test_an_offset_is_one_number_a_channel_and_is_to_be_predicted(pipe: Any):
    given = batch()
    torch.manual_seed(9)
    offset = 0.3 * torch.randn(3, 4, 1, 1)
    noise = given["noise"] + offset
    expected = errors(predicted(pipe, given, noise), noise).mean()
    torch.manual_seed(9)
    assert learning(pipe, noise_offset=0.3).loss(given).item() == pytest.approx(expected.item(), rel=1e-4)


@torch.no_grad()
def test_a_perturbation_is_seen_and_not_to_be_predicted(pipe: Any):
    given = batch()
    torch.manual_seed(9)
    noise = given["noise"] + 0.2 * torch.randn(3, 4, 8, 8)
    expected = errors(predicted(pipe, given, noise), given["noise"]).mean()
    torch.manual_seed(9)
    assert learning(pipe, input_perturbation=0.2).loss(given).item() == pytest.approx(expected.item(), rel=1e-4)


@torch.no_grad()
def test_weights_of_times_and_the_huber_error_go_into_the_loss(pipe: Any):
    given = batch()
    times = (given["u"] * 1000).long()
    kept = torch.cumprod(1 - pipe.scheduler.betas.double(), 0)[times]
    ratio = kept / (1 - kept)
    off = (predicted(pipe, given, given["noise"]) - given["noise"].double()) ** 2
    huber = (2 * 0.1 * ((off + 0.01).sqrt() - 0.1)).flatten(1).mean(1)
    expected = (ratio.clamp(max=5) / ratio * huber).mean()
    found = learning(pipe, loss="huber", loss_weighting="min_snr").loss(given)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    plain = learning(pipe, loss="huber", loss_weighting="min_snr", noise_offset=0.5).error(given)
    assert torch.allclose(plain.double(), off.flatten(1).mean(1), rtol=1e-4)


@pytest.fixture
def adapted(pipe: Any) -> Any:
    adapters = ak.Adapters(pipe)
    adapters.add("style", ak.LoRA(rank=2, targets="attention@component=unet"), seed=0)
    with torch.no_grad():
        for number, (name, tensor) in enumerate(sorted(adapters.state_dict("style").items())):
            if name.endswith("/B"):
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    yield adapters
    adapters.detach()


def test_the_base_teaches_what_prior_pictures_are_taken_for(pipe: Any, adapted: ak.Adapters):
    given = batch(prior=torch.tensor([False, True, True]))
    with adapted.disabled():
        base = predicted(pipe, given, given["noise"])
    mine = predicted(pipe, given, given["noise"])
    assert (mine - base).abs().max() > 0.01
    target = torch.cat([given["noise"][:1].double(), base[1:]])
    found = learning(pipe, teacher=True).loss(given)
    assert found.item() == pytest.approx(errors(mine, target).mean().item(), rel=1e-4)
    found.backward()
    assert any(p.grad is not None and p.grad.any() for p in adapted.parameters("style"))
    plain = learning(pipe).loss(given).item()
    assert plain == pytest.approx(errors(mine, given["noise"]).mean().item(), rel=1e-4)


def test_what_another_caption_means_is_preserved(pipe: Any, adapted: ak.Adapters):
    given, captions = batch(), ["one circle"] * 3
    with adapted.disabled():
        base = predicted(pipe, given, given["noise"], captions)
    mine = predicted(pipe, given, given["noise"], captions)
    own = errors(predicted(pipe, given, given["noise"]), given["noise"]).mean()
    expected = own + 0.7 * errors(mine, base).mean()
    found = learning(pipe, preserve_weight=0.7, preserve_caption="one circle").loss(given)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
