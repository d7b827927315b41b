"""Runs of several processes; all of them on CPUs, over gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from adapterkit.training import yaml_values
from adapterkit.training.loop import finish, train
from adapterkit.training.run import load_run
from adapterkit.training.run_folder import read_metrics
from tests.backends.vision_models import vit_config
from tests.cli.launched import command, environment, together
from tests.training import small_pipeline, toy_task
from tests.training.language import tiny

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` tells its processes."""


def written(folder: Path, values: Mapping[str, Any]) -> Path:
    """A run file."""
    path = folder / "run.yaml"
    path.write_text(yaml_values.dump({**values, "versions": {}}))
    return path


def toy(folder: Path) -> Path:
    config = toy_task.toy_run(folder / "run", checkpoint_every=None).resolved()
    return written(folder, {**config, "adapter": {**config["adapter"], "dropout": 0.0}})


def language(folder: Path) -> Path:
    text = "the cat sat the dog ran far why the cat ran "
    (folder / "data.txt").write_text("".join(text[n % 7 * 4 :] + text for n in range(30)))
    run = tiny.run_of(
        tiny.llama(folder / "base"), folder / "data.txt", folder / "run", task="causal-lm",
        prompts=["the cat"], sample_tokens=6, validation_fraction=0.2,
    )  # fmt: skip
    return written(folder, {**run.resolved(), "steps": 6, "evaluate_every": 2, "best": "loss", "ema": 0.9})


def classes(folder: Path) -> Path:
    for name, colour in {"blue": (0, 0, 255), "red": (255, 0, 0)}.items():
        (folder / "data" / name).mkdir(parents=True)
        for number in range(8):
            shade = tuple(max(0, channel - 12 * number) for channel in colour)
            Image.new("RGB", (16, 16), shade).save(folder / "data" / name / f"{number}.png")
    torch.manual_seed(0)
    ViTForImageClassification(vit_config(num_labels=3)).save_pretrained(folder / "base")
    adapter = {"type": "lora", "rank": 2, "targets": "attention"}
    options = {"validation_fraction": 0.25, "train_head": True}
    return written(folder, {**told(folder, "image-classification"), "adapter": adapter, "options": options})


def pictures(folder: Path) -> Path:
    small_pipeline.write_base(folder)
    options = {"sample_steps": 2, "resolution": 16, "prompts": ["a circle"]}
    adapter = {"type": "lora", "rank": 4, "targets": "attention@component=unet"}
    return written(folder, {**told(folder, "diffusion"), "adapter": adapter, "options": options})


def told(folder: Path, task: str) -> dict[str, Any]:
    values = {"task": task, "model": str(folder / "base"), "data": str(folder / "data"), "output": str(folder / "run")}
    return {**values, "steps": 4, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 2, "export": []}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def assert_close(one: Path, other: Path) -> None:
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("make", [toy, language, classes])
def test_a_base_that_is_spread_trains_as_in_one_process(make: Callable[[Path], Path], tmp_path: Path):
    file = make(tmp_path)
    alone = train(load_run(file, [f"output={tmp_path / 'one'}", "batch_size=4"]), silent=True)
    told = succeeded(together(tmp_path, "train", file, f"output={tmp_path / 'two'}", "batch_size=2", "shard=true"))
    here, whole = re.search(
        r"spread over 2 processes: model, in 2 units, ([\d.]+) KiB of ([\d.]+) KiB here", told
    ).groups()  # pyright: ignore
    assert float(here) < 0.8 * float(whole)
    assert_close(tmp_path / "two", tmp_path / "one")
    figures = json.loads((tmp_path / "two/summary.json").read_text())["figures"]
    for name, value in figures.items():
        assert value == (pytest.approx(alone.figures[name], abs=1e-5) if isinstance(value, float) else value)
    for sample in (tmp_path / "one/samples").glob("step_*"):
        assert (tmp_path / "two/samples" / sample.name).read_text() == sample.read_text()
    assert not (tmp_path / "two/export").exists()


@pytest.mark.slow
def test_a_style_of_two_processes_is_that_of_one(tmp_path: Path):
    """By plain descent: Adam makes of a gradient near zero a whole step, and so of its last bits."""
    file = pictures(tmp_path)
    run = ["optimizer={type: sgd}", "learning_rate=0.1", "samples=false"]
    train(load_run(file, [f"output={tmp_path / 'one'}", *run]), silent=True)
    succeeded(together(tmp_path, "train", file, f"output={tmp_path / 'two'}", "batch_size=2", *run))
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_denoiser_that_is_spread_trains_and_draws_as_one_that_is_not(tmp_path: Path):
    file = pictures(tmp_path)
    succeeded(together(tmp_path, "train", file, f"output={tmp_path / 'whole'}", "batch_size=2"))
    told = succeeded(together(tmp_path, "train", file, f"output={tmp_path / 'run'}", "batch_size=2", "shard=true"))
    assert "spread over 2 processes: unet, " in told
    assert_close(tmp_path / "run", tmp_path / "whole")
    samples = [sorted((tmp_path / folder / "samples").glob("step_*.png")) for folder in ("run", "whole")]
    assert len(samples[0]) == 2
    for mine, theirs in zip(*samples, strict=True):
        apart = ImageChops.difference(Image.open(mine), Image.open(theirs)).tobytes()
        assert max(apart) <= 1  # of 255


@pytest.mark.slow
@pytest.mark.parametrize("make", [language, classes])
def test_accelerates_launcher_spreads_alike(make: Callable[[Path], Path], tmp_path: Path):
    """By default one process has the values that the others may lack: transformers leaves a fresh head without any."""
    file, look = make(tmp_path), "from tests.cli.launched import tell_devices; tell_devices()"
    succeeded(together(tmp_path, "train", file, f"output={tmp_path / 'run'}", "batch_size=2", "shard=true"))
    told = together(tmp_path, "train", file, f"output={tmp_path / 'sent'}", "batch_size=2", also=look, told=FSDP)
    lacking = ", meta" if make is classes else ""
    assert f"rank 1 has a model on cpu{lacking}" in succeeded(told)
    assert "rank 0 has a model on cpu\n" in told.stderr
    assert (tmp_path / "sent/adapter.safetensors").read_bytes() == (tmp_path / "run/adapter.safetensors").read_bytes()


@pytest.mark.slow
def test_a_spread_run_is_finished_by_one_process_with_files_for_others(tmp_path: Path):
    file = language(tmp_path)
    told = succeeded(together(tmp_path, "train", file, "batch_size=2", "shard=true", "export=null", "bake=true"))
    left = "grids, the baked model and files for other tools are left to one process with the whole base"
    assert f"{left}: adapterkit finish {tmp_path / 'run'}" in told
    before = (tmp_path / "run/adapter.safetensors").read_bytes()
    finish(tmp_path / "run", silent=True)
    assert (tmp_path / "run/export/peft/adapter_config.json").is_file()
    assert (tmp_path / "run/model/config.json").is_file()
    assert (tmp_path / "run/adapter.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("make", [toy, language])
def test_a_run_goes_on_in_another_number_of_processes(make: Callable[[Path], Path], spread: bool, tmp_path: Path):
    """Two, then one, then two again: every step has the same examples as in the uninterrupted run."""
    file, shard, rate = make(tmp_path), f"shard={json.dumps(spread)}", "scheduler=constant"
    whole = train(load_run(file, [f"output={tmp_path / 'whole'}", "batch_size=4", "steps=6", rate]), silent=True)
    given = ["batch_size=2", "checkpoint_every=1", shard, rate]
    succeeded(together(tmp_path, "train", file, *given, "steps=2"))
    train(load_run(file, [*given, "steps=4"]), resume=True, silent=True)
    state = json.loads((tmp_path / "run/checkpoints/step-000004/state.json").read_text())
    assert state["values"]["portions"] == {"examples": 4, "together": 4}
    told = succeeded(together(tmp_path, "train", file, *given, "steps=6", "--resume"))
    assert "as before" not in told
    assert_close(tmp_path / "run", tmp_path / "whole")
    losses = [[r["loss"] for r in read_metrics(tmp_path / f / "metrics.jsonl") if "lr" in r] for f in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)
    assert whole.step == 6


@pytest.mark.slow
def test_the_same_values_are_the_same_bytes_however_many_write_them(tmp_path: Path):
    file = toy(tmp_path)
    train(load_run(file, [f"output={tmp_path / 'first'}"]), silent=True)
    values = ["steps=1", "learning_rate=1e-30", f"init_from={tmp_path / 'first/adapter.safetensors'}"]
    train(load_run(file, [*values, f"output={tmp_path / 'one'}"]), silent=True)
    succeeded(together(tmp_path, "train", file, *values, f"output={tmp_path / 'two'}"))
    succeeded(together(tmp_path, "train", file, *values, f"output={tmp_path / 'spread'}", "shard=true"))
    bytes = {name: (tmp_path / name / "adapter.safetensors").read_bytes() for name in ("one", "two", "spread")}
    assert bytes["one"] == bytes["two"] == bytes["spread"]
    assert all(
        torch.equal(tensor, tensors(tmp_path / "first")[key]) for key, tensor in tensors(tmp_path / "one").items()
    )


FAILING = """
import os, signal
from adapterkit.errors import DataError
loss = toy_task.ToyTask.loss
def fails(self, batch):
    if self.calls == 3 and os.environ["RANK"] == os.environ["FAILING"]:
        if "KILLED" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("this file cannot be read")
    return loss(self, batch)
toy_task.ToyTask.loss = fails
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_of_one_process_is_told_once_and_ends_all(rank: str, tmp_path: Path):
    done = together(tmp_path, "train", toy(tmp_path), "checkpoint_every=2", also=FAILING, told={"FAILING": rank})
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: this file cannot be read"
    ]
    assert "Connection" not in done.stderr
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(tmp_path: Path):
    done = together(tmp_path, "train", toy(tmp_path), "stepz=3")
    assert done.returncode == 1
    assert done.stderr.count("unknown key 'stepz'") == 1


@pytest.mark.slow
def test_a_run_that_lost_a_process_is_finished_by_one(tmp_path: Path):
    killed = {"FAILING": "1", "KILLED": "1"}
    done = together(tmp_path, "train", toy(tmp_path), "checkpoint_every=2", "shard=true", also=FAILING, told=killed)
    assert done.returncode == 1
    assert finish(tmp_path / "run", silent=True).step == 2
    assert (tmp_path / "run/adapter.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_leaves_one_checkpoint(number: signal.Signals, spread: bool, tmp_path: Path):
    arguments = ["train", toy(tmp_path), "steps=100000", f"shard={json.dumps(spread)}"]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(tmp_path, *arguments), env=environment(), start_new_session=True, **pipes)
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and any("lr" in record for record in read_metrics(metrics))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal does; the launcher tells its processes
    _, told = process.communicate(timeout=60)
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert told.count(f"stopped after step {step}; a checkpoint is saved") == 1
    assert len([r for r in read_metrics(metrics) if "lr" in r]) == step


@pytest.mark.slow
def test_one_process_speaks_of_a_dry_run_and_of_the_end(tmp_path: Path):
    file = toy(tmp_path)
    plan = together(tmp_path, "train", file, "--dry-run")
    assert (plan.returncode, plan.stdout.count("task: toy-task")) == (0, 1)
    train(load_run(file, ["checkpoint_every=2", "steps=3"]), silent=True)
    ended = together(tmp_path, "finish", tmp_path / "run")
    assert (ended.returncode, ended.stdout.count("loss (last steps)")) == (0, 1)
