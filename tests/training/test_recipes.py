"""Each recipe's loss against the formula that its pipeline implies, in float64, and a run of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from safetensors.torch import load_file

import adapterkit as ak
from adapterkit.errors import ConfigError
from adapterkit.training.config import RunConfig
from adapterkit.training.diffusion.options import Options
from adapterkit.training.diffusion.recipes.wan import Wan
from adapterkit.training.loop import train
from adapterkit.training.order import Draw
from adapterkit.training.run import Run, load_run
from adapterkit.training.task import Setting
from tests.training import tiny_pipelines
from tests.training.pipeline_steps import own_prediction

SOON = frozenset({"sd3", "z_image"})
"""Of these a whole run is among the fast tests; of the others it takes the loss and its gradient."""
RUNS = [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in tiny_pipelines.PIPELINES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pipeline, made once."""
    return functools.cache(lambda name: tiny_pipelines.saved(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number, caption in enumerate(("one red circle", "two blue square", "one blue")):
        Image.effect_noise((20 + number, 16), 90).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def make_run(model: Path, data: Path, output: Path, **options: Any) -> Run:
    values: dict[str, Any] = {
        "task": "diffusion",
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "adapter": {"type": "lora", "rank": 2, "targets": "attention@component=transformer"},
        "options": {"sample_steps": 2, "prompts": ["one red"], "resolution": 32, **options},
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 1e-2,
    }
    return load_run(None, (), **values)


def quiet(run: Run) -> RunConfig:
    """Without files for others."""
    return run.config.model_copy(update={"export": []})


@pytest.mark.parametrize("name", RUNS)
def test_a_style_is_trained_and_sampled(saved: Callable[[str], Path], name: str, data: Path, tmp_path: Path):
    result = train(make_run(saved(name), data, tmp_path / "run"), silent=True)
    assert 0 < result.loss < 20
    weights = load_file(tmp_path / "run/adapter.safetensors")
    assert {key.partition("@")[2].partition(".")[0] for key in weights} >= {"transformer"}
    moved = {key for key, value in weights.items() if key.endswith("/B") and "@transformer" in key and value.any()}
    assert moved
    assert {path.name for path in (tmp_path / "run/samples").iterdir()} >= {"step_000002_p0_s42.png", "grid.png"}
    card = (tmp_path / "run/README.md").read_text()
    assert card.count(f"adapterkit {ak.__version__} agrees") == 2  # a file for the UIs, and one for diffusers
    assert "DIFFERS" not in card
    assert "CANNOT READ IT" not in card


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_the_loss_is_that_of_what_the_pipeline_itself_predicts(
    saved: Callable[[str], Path], name: str, data: Path, tmp_path: Path
):
    """The pipeline's own loop says what the denoiser predicts; the target is that of the paper, in float64."""
    task, batch = prepared(make_run(saved(name), data, tmp_path / "run", caption_dropout=0.0, resolution=[32, 64]))
    times = task.learning.objective.times(batch["u"], task.recipe.tokens(batch["latents"])).double()
    latents, noise = batch["latents"].double(), batch["noise"].double()
    kind = task.pipe.scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        share = times.view(-1, 1, 1, 1)
        noisy, target, clock = (1 - share) * latents + share * noise, noise - latents, times * 1000
    else:
        betas = task.learning.objective.schedule.betas.double()
        kept = torch.cumprod(1 - betas, 0)[times.long()].view(-1, 1, 1, 1)
        noisy, target, clock = kept.sqrt() * latents + (1 - kept).sqrt() * noise, noise, times
    found = [
        own_prediction(task.pipe, batch["caption"][row], noisy[row : row + 1].float(), time, (32, 64))
        for row, time in enumerate(clock.tolist())
    ]
    text, seen = task.texts(batch["caption"]), noisy.float()
    with torch.no_grad():
        predicted = task.recipe.predict(seen, times.float() if kind == "flow_prediction" else times.long(), text, batch)
    assert torch.allclose(predicted, torch.cat(found), rtol=1e-4, atol=1e-4)
    expected = ((torch.cat(found).double() - target) ** 2).mean()
    adapters = ak.Adapters(task.pipe)
    adapters.add("style", ak.LoRA(rank=2, targets="attention@component=transformer"), seed=0)  # which adds nothing yet
    loss = task.loss(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in adapters.parameters("style") if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in adapters.parameters("style"))


def prepared(run: Run) -> tuple[Any, dict[str, Any]]:
    """A task that is ready, and a batch of two captions."""
    task: Any = run.make_task()
    pipe = task.load_model()
    images = task.prepare(Setting(pipe, torch.device("cpu"), ak.points(pipe, "attention@component=transformer")))
    return task, task.collate([images[Draw(i, 20 + i)] for i in range(2)])


def test_text_encoders_of_every_kind_are_trained_too(data: Path, tmp_path: Path):
    model = tiny_pipelines.saved("sd3", tmp_path)
    run = make_run(model, data, tmp_path / "run", caption_dropout=0.0)
    targets = "attention@component=text_encoder attention@component=text_encoder_2 attention@component=text_encoder_3"
    train(replace(run, adapter=replace(run.adapter, targets=targets), config=quiet(run)), silent=True)
    weights = load_file(tmp_path / "run/adapter.safetensors")
    moved = {key.partition("@")[2].partition(".")[0] for key, value in weights.items() if "/B" in key and value.any()}
    assert moved == {"text_encoder", "text_encoder_2", "text_encoder_3"}


def test_of_two_denoisers_that_of_the_times_is_trained(data: Path, tmp_path: Path):
    pipe = tiny_pipelines.wan(tmp_path)
    pipe.register_modules(transformer_2=tiny_pipelines.wan(tmp_path).transformer)
    pipe.register_to_config(boundary_ratio=0.875)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"Train one: \[0\.875, 1\.0\] with targets at @component=transformer"):
        train(make_run(tmp_path / "model", data, tmp_path / "run"), silent=True)
    for component, times in (("transformer", (0.875, 1.0)), ("transformer_2", (0.0, 0.875))):
        run = make_run(tmp_path / "model", data, tmp_path / component, time_range=list(times))
        adapter = replace(run.adapter, targets=f"attention@component={component}")
        train(replace(run, adapter=adapter, config=quiet(run)), silent=True)
        weights = load_file(tmp_path / component / "adapter.safetensors")
        assert any(value.any() for key, value in weights.items() if key.endswith("/B"))


def test_no_caption_is_what_guidance_steers_away_from(data: Path, tmp_path: Path):
    """Lumina and Sana put instructions in front of captions, and none in front of nothing."""
    for name in ("lumina2", "sana"):
        task, _ = prepared(make_run(tiny_pipelines.saved(name, tmp_path / name), data, tmp_path / "run"))
        *_, negative, mask = task.pipe.encode_prompt("one red", True, negative_prompt="", device=torch.device("cpu"))
        text = task.recipe.encode_text(["one red", ""], torch.device("cpu"))
        assert torch.allclose(text["states"][1], negative[0], atol=1e-6)
        assert torch.equal(text["mask"][1].bool(), mask[0].bool())
        assert int(text["mask"][0].sum()) > int(text["mask"][1].sum())


def test_flux2_shifts_times_as_its_pipeline_does(tmp_path: Path):
    task: Any = make_run(tiny_pipelines.saved("flux2", tmp_path), tmp_path, tmp_path / "run").make_task()
    pipe = task.load_model()
    u = torch.tensor([0.5])
    plain = task.recipe.objective().times(u, 4096).item()
    pipe.scheduler.set_timesteps(sigmas=[0.5], mu=compute_empirical_mu(4096, 50))
    assert plain == pytest.approx(pipe.scheduler.sigmas[0].item(), rel=1e-5)


def test_text_encoders_have_a_rate_of_their_own(saved: Callable[[str], Path], data: Path, tmp_path: Path):
    run = make_run(saved("flux"), data, tmp_path / "run", caption_dropout=0.0)
    values = {
        **run.config.model_dump(exclude={"versions"}),
        "options": {"sample_steps": 1, "prompts": ["one red"], "resolution": 32},
        "adapter": {"type": "lora", "rank": 2, "targets": "attention"},
        "rates": [{"select": "@component=text_encoder_2", "learning_rate": 1e-6}],
        "export": [],
    }
    train(load_run(None, (), **values), silent=True)
    weights = load_file(tmp_path / "run/adapter.safetensors")
    largest = {
        part: max(float(value.abs().max()) for key, value in weights.items() if f"@{part}." in key and "/B" in key)
        for part in ("transformer", "text_encoder_2")
    }
    assert 0 < largest["text_encoder_2"] < 1e-5  # Adam's steps are as long as the rate
    assert largest["transformer"] > 1e-3


def test_a_wan_that_is_told_the_time_of_each_token(tmp_path: Path):
    torch.manual_seed(0)
    pipe = tiny_pipelines.wan(tmp_path)
    pipe.text_encoder.eval()
    pipe.transformer.eval()
    pipe.register_to_config(expand_timesteps=True)
    recipe = Wan(pipe, Options())
    noisy = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    times, prompts = torch.tensor([0.3, 0.8]), ("one red", "two blue square")
    with torch.no_grad():
        found = recipe.predict(noisy, times, recipe.encode_text(prompts, torch.device("cpu")), {})
    for row, prompt in enumerate(prompts):
        own = own_prediction(pipe, prompt, noisy[row : row + 1], float(times[row]) * 1000, (16, 32))
        assert torch.allclose(found[row], own[0], atol=1e-5)
