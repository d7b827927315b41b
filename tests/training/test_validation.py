"""The loss on fixed noise and times, of pictures that are not trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import adapterkit as ak
from adapterkit.errors import ConfigError
from adapterkit.training.loop import train
from adapterkit.training.order import Draw, derive_seed
from adapterkit.training.parts import inference
from adapterkit.training.run import Run, load_run
from adapterkit.training.run_folder import read_metrics
from adapterkit.training.task import Setting
from tests.backends.vision_models import pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "words").mkdir()
    torch.manual_seed(0)
    pipeline(folder / "words").save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(5):
        torch.manual_seed(number)
        Image.effect_noise((16, 16 + 8 * (number % 2)), 90).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("one red circle")
    return folder


def make_run(base: Path, data: Path, output: Path, **options: Any) -> Run:
    values: dict[str, Any] = {
        "task": "diffusion",
        "model": str(base),
        "data": str(data),
        "output": str(output),
        "adapter": {"type": "lora", "rank": 2, "targets": "attention@component=unet"},
        "options": {"sample_steps": 1, "prompts": ["one red"], "flip": True, "caption_dropout": 0.9, **options},
        "steps": 4,
        "sample_every": 2,
        "learning_rate": 1e-2,
        "export": [],
    }
    return load_run(None, (), **values)


def prepared(run: Run) -> tuple[Any, Any, list[str]]:
    task: Any = run.make_task()
    task.survey(None)
    model, told = task.load_model(), []
    data = task.prepare(Setting(model, torch.device("cpu"), ak.points(model, adapter=run.adapter), told.append))
    return task, data, told


def test_a_share_of_several_concepts_is_measured(base: Path, data: Path, tmp_path: Path):
    for name in ("one", "two"):
        shutil.copytree(data, tmp_path / "both" / name)
    concepts = [{"folder": "one", "repeats": 3}, {"folder": "two"}]
    given = {"concepts": concepts, "validation_fraction": 0.2}
    task, training, told = prepared(make_run(base, tmp_path / "both", tmp_path / "run", **given))
    assert len(task.validation.data) == 2
    kept = {name: [line for line in told if line.startswith(f"data: {name}: ")] for name in ("one", "two")}
    assert all(len(lines) == 1 for lines in kept.values())
    assert {line.partition(": ")[0] for line in told} == {"data"}
    measured = [example.picture.concept.folder for example in task.validation.data.examples]
    assert len(training) == 4 * 5 - sum({"one": 3, "two": 1}[folder] for folder in measured)


def test_it_is_the_error_at_fixed_times_with_fixed_noise(base: Path, data: Path, tmp_path: Path):
    task, training, told = prepared(make_run(base, data, tmp_path / "run", validation_fraction=0.4))
    assert len(training) == 3
    held = [example.picture.path.name for example in task.validation.data.examples]
    assert len(held) == 2
    assert any(line.startswith("data: measure the loss and are not trained on: 2 (") for line in told)
    assert not {example.picture.path.name for example in training.examples} & {*held}
    errors = []
    unet, betas = task.pipe.unet, task.pipe.scheduler.betas.double()
    with inference(task.pipe):
        for index in range(2):
            for time in range(4):
                item = task.validation.data[Draw(index, derive_seed("validation", index, time))]
                assert item["caption"] == "one red circle"
                step = int((time + 0.5) / 4 * 1000)
                kept = torch.cumprod(1 - betas, 0)[step]
                noise = item["noise"].double()
                noisy = kept.sqrt() * item["latents"].double() + (1 - kept).sqrt() * noise
                states = task.texts([item["caption"]])["states"]
                found = unet(noisy[None].float(), torch.tensor([step]), states).sample
                errors.append(((found.double() - noise) ** 2).mean())
        figures = [task.evaluate() for _ in range(2)]
    assert figures[0] == figures[1]
    assert figures[0]["validation_loss"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


def test_which_pictures_measure_follows_from_what_they_hold(base: Path, data: Path, tmp_path: Path):
    chosen = []
    for number, seed in enumerate((0, 0, 1, 2, 3)):
        folder = tmp_path / f"data{number}"
        shutil.copytree(data, folder)
        if number == 1:
            (folder / "0.png").rename(folder / "z.png")
            (folder / "0.txt").rename(folder / "z.txt")
        run = make_run(base, folder, tmp_path / "run", validation_fraction=0.2)
        task, _, _ = prepared(load_run(None, (), **{**run.config.model_dump(), "seed": seed}))
        [example] = task.validation.data.examples
        chosen.append(example.picture.key)
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1


def test_a_folder_of_its_own_measures_a_run(base: Path, data: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("1.png", "1.txt"):
        shutil.copy(data / name, other)
    run = make_run(base, data, tmp_path / "run", validation_data=str(other))
    train(run, silent=True)
    losses = [
        record["validation_loss"]
        for record in read_metrics(tmp_path / "run/metrics.jsonl")
        if "validation_loss" in record
    ]
    assert len(losses) == 3
    assert len(set(losses)) == 3
    _, training, told = prepared(run)
    assert len(training) == 5
    assert "data: pictures of options.validation_data that are trained on, too: 1 (1.png)" in told


def test_what_cannot_measure_is_named(base: Path, data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="validation_fraction or validation_data, not both"):
        make_run(base, data, tmp_path / "run", validation_fraction=0.1, validation_data="x")
    (tmp_path / "one").mkdir()
    for name in ("1.png", "1.txt"):
        shutil.copy(data / name, tmp_path / "one")
    with pytest.raises(ConfigError, match="there is one picture only"):
        prepared(make_run(base, tmp_path / "one", tmp_path / "run", validation_fraction=0.5))
    with pytest.raises(Exception, match="absent"):
        train(make_run(base, data, tmp_path / "run", validation_data=str(tmp_path / "absent")), silent=True)
