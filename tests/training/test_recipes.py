"""Each recipe's loss against the formula that its pipeline implies, in float64, and a run of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import adapterkit as ak
from adapterkit.training.loop import train
from adapterkit.training.order import Draw
from adapterkit.training.run import Run, load_run
from adapterkit.training.task import Setting
from tests.training import tiny_pipelines
from tests.training.pipeline_steps import own_prediction


@pytest.fixture(scope="module", params=tiny_pipelines.PIPELINES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.saved(request.param, tmp_path_factory.mktemp(request.param))


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
        "options": {"sample_steps": 2, "prompts": ["one red"], "resolution": 16, **options},
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 1e-2,
    }
    return load_run(None, (), **values)


def test_a_style_is_trained_and_sampled(model: Path, data: Path, tmp_path: Path):
    result = train(make_run(model, data, tmp_path / "run"), silent=True)
    assert 0 < result.loss < 20
    weights = load_file(tmp_path / "run/adapter.safetensors")
    assert {key.partition("@")[2].partition(".")[0] for key in weights} >= {"transformer"}
    moved = {key for key, value in weights.items() if key.endswith("/B") and "@transformer" in key and value.any()}
    assert moved
    assert {path.name for path in (tmp_path / "run/samples").iterdir()} >= {"step_000002_p0_s42.png", "grid.png"}


def test_the_loss_is_that_of_what_the_pipeline_itself_predicts(model: Path, data: Path, tmp_path: Path):
    """The pipeline's own loop says what the denoiser predicts; the target is that of the paper, in float64."""
    task, batch = prepared(make_run(model, data, tmp_path / "run", caption_dropout=0.0))
    times = task.objective.times(batch["u"], task.recipe.tokens(batch["latents"])).double()
    latents, noise = batch["latents"].double(), batch["noise"].double()
    kind = task.pipe.scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        share = times.view(-1, 1, 1, 1)
        noisy, target, clock = (1 - share) * latents + share * noise, noise - latents, times * 1000
    else:
        betas = task.objective.schedule.betas.double()
        kept = torch.cumprod(1 - betas, 0)[times.long()].view(-1, 1, 1, 1)
        noisy, target, clock = kept.sqrt() * latents + (1 - kept).sqrt() * noise, noise, times
    found = [
        own_prediction(task.pipe, batch["caption"][row], noisy[row : row + 1].float(), time, (16, 16))
        for row, time in enumerate(clock.tolist())
    ]
    expected = ((torch.cat(found).double() - target) ** 2).mean()
    with torch.no_grad():
        assert task.loss(batch).item() == pytest.approx(expected.item(), rel=1e-4)


def prepared(run: Run) -> tuple[Any, dict[str, Any]]:
    """A task that is ready, and a batch of two captions."""
    task: Any = run.make_task()
    pipe = task.load_model()
    images = task.prepare(Setting(pipe, torch.device("cpu"), ak.points(pipe, "attention@component=transformer")))
    return task, task.collate([images[Draw(i, 20 + i)] for i in range(2)])
