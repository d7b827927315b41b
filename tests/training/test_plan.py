"""What does not fit is told before a weight is read, and a dry run says what would be trained on."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import adapterkit as ak
from adapterkit.adapters.trainable import Trainable
from adapterkit.errors import ConfigError, StateError, TargetNotFoundError
from adapterkit.training.classification.task import ImageClassificationTask
from adapterkit.training.loop import train
from adapterkit.training.needs import Needs, told
from adapterkit.training.plan import plan_of
from adapterkit.training.run import Run, load_run

Usage = namedtuple("Usage", "total used free")
MODEL = "timm:test_vit"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make(tmp_path)


def make(tmp_path: Path, *overrides: str, targets: str = "attention") -> Run:
    data = tmp_path / "classes"
    for number, name in enumerate(("cat", "dog")):
        (data / name).mkdir(parents=True, exist_ok=True)
        for each in range(3):
            Image.new("RGB", (40, 40), (90 * number, each, 0)).save(data / name / f"{each}.png")
    values: dict[str, Any] = {
        "task": "image-classification", "model": MODEL, "data": str(data), "output": str(tmp_path / "run"),
        "adapter": {"type": "lora", "rank": 2, "targets": targets},
        "options": {"train_head": True, "model_args": {"pretrained": False}},
    }  # fmt: skip
    return load_run(None, overrides, **values)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> Any:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(ImageClassificationTask, "load_model", refuse)


def test_a_plan_is_what_the_run_will_do(run: Run, unread: None, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(run)
    assert plan.record.facts == {
        "images": "6",
        "parts": "4 to train on, 2 to measure with",
        "classes": "cat 3, dog 3",
    }
    model = timm.create_model("test_vit", num_classes=2)
    adapters = ak.Adapters(model)
    adapters.add("a", [run.adapter, Trainable("head")])  # the fresh head is a part of the adapter
    added = sum(p.numel() for p in adapters.parameters("a"))
    base = sum(p.numel() for p in timm.create_model("test_vit", num_classes=2).parameters())
    assert plan.needs == Needs(weights=4 * base, training=16 * added, disk=4 * added * (3 * 3 + 1))
    assert [point.id for point in plan.points] == [*adapters.modules("a")]
    assert "6" in plan.facts["images"]
    assert f"disk {told(plan.needs.disk)}" in plan.facts["it takes"]


def test_a_wrong_target_is_told_before_weights_are_read(tmp_path: Path, unread: None):
    with pytest.raises(TargetNotFoundError):
        train(make(tmp_path, targets="cross"), silent=True)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_before_weights_are_read(run: Run, unread: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 100, 100))
    with pytest.raises(StateError, match=r"100 B free.*keep_checkpoints=1"):
        train(run, silent=True)


def test_fewer_checkpoints_take_less(tmp_path: Path):
    many, none = plan_of(make(tmp_path)).needs, plan_of(make(tmp_path, "checkpoint_every=null")).needs
    assert many.training == none.training
    assert many.disk * 4 == none.disk * 10


def test_weights_are_counted_in_their_dtype(tmp_path: Path):
    assert plan_of(make(tmp_path, "dtype=bfloat16")).needs.weights * 2 == plan_of(make(tmp_path)).needs.weights


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (3 << 30, "3 GiB"), (1023 << 20, "1023 MiB")]
)
def test_bytes_as_people_say_them(count: int, text: str):
    assert told(count) == text


def test_an_outline_has_no_memory(run: Run):
    task = run.make_task()
    task.survey(None)
    assert {p.device for p in task.outline().parameters()} == {torch.device("meta")}


def test_an_outline_of_a_pipeline_has_the_points_of_the_pipeline(tmp_path: Path):
    config = Path(__file__).parents[2] / "examples" / "configs" / "digits-style.yaml"
    style = load_run(config, [f"output={tmp_path}", "adapter.targets=attention"])
    task = style.make_task()
    loaded = ak.points(task.load_model(), adapter=style.adapter)
    foreseen = plan_of(style).points
    assert [point.id for point in foreseen] == [point.id for point in loaded]
    assert foreseen.costs == loaded.costs


def test_optimizer_average_and_best_take_their_room(tmp_path: Path):
    plain = plan_of(make(tmp_path)).needs
    other = plan_of(make(tmp_path, "optimizer=sgd", "ema=0.9", "best=accuracy")).needs
    adapter = plain.training // 4  # itself, its gradient, two moments
    assert other.training == 4 * adapter  # itself, its gradient, one momentum, the average
    assert plain.disk == adapter * (3 * 3 + 1)
    assert other.disk == adapter * (3 * 3 + 2)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["best=acuracy"], r"best: the task measures no 'acuracy'\. Did you mean 'accuracy'\?"),
        (["best=mAP"], r"no 'mAP'\. Known: accuracy, f1, loss\."),
    ],
)
@pytest.mark.usefixtures("unread")
def test_a_figure_that_will_not_be_measured_is_told_before_weights_are_read(
    tmp_path: Path, overrides: list[str], reason: str
):
    for look in (plan_of, train):
        with pytest.raises(ConfigError, match=reason):
            look(make(tmp_path, *overrides))


@pytest.mark.usefixtures("unread")
def test_a_policy_that_timm_does_not_have_is_told_before_weights_are_read(tmp_path: Path):
    run = make(tmp_path)
    changed = run.options.model_copy(update={"auto_augment": "rnd-m9"})
    with pytest.raises(ConfigError, match=r"options\.auto_augment: timm has no 'rnd-m9'"):
        plan_of(replace(run, options=changed))
