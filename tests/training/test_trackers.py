from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from adapterkit.errors import ConfigError
from adapterkit.training.loop import train
from adapterkit.training.plots import figures_in, plot, running_mean
from adapterkit.training.samples.sample import Sample
from adapterkit.training.trackers import Trackers
from tests.training.test_loop import losses
from tests.training.toy_task import ToyTask, toy_run


def drawn(self: ToyTask, sample: Sample, path: Path) -> None:
    Image.new("RGB", (8, 6), (200, 30, 30)).save(path)


def test_tensorboard_has_metrics_figures_pictures_and_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(ToyTask, "suffixes", (".png",))
    monkeypatch.setattr(ToyTask, "generate", drawn)
    train(toy_run(tmp_path / "run", trackers=["tensorboard"], steps=3), silent=True)
    folders = {file.parent for file in (tmp_path / "run/trackers").rglob("events.out.tfevents.*")}
    found: dict[str, dict[int, float]] = {}
    images: dict[str, list[int]] = {}
    texts: set[str] = set()
    for folder in folders:
        events = accumulator.EventAccumulator(str(folder)).Reload()
        tags = events.Tags()
        for tag in tags["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
        images |= {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}
        texts |= {*tags["tensors"]}
    expected = {record["step"]: record["loss"] for record in losses(tmp_path / "run")}
    assert found["train/loss"] == pytest.approx(expected)
    assert sorted(found["evaluate/entropy"]) == [0, 3]
    assert images == {"samples/p0_s42": [0, 3], "samples/p1_s42": [0, 3]}
    hparams = next((tmp_path / "run/trackers").rglob("hparams.yml")).read_text()
    assert "adapter.rank: 2" in hparams
    assert "optimizer.type: adamw" in hparams


def test_trackers_that_are_unknown_or_not_there_are_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyTask, "load_model", lambda self: pytest.fail("nothing need be loaded"))
    with pytest.raises(ConfigError) as caught:
        train(toy_run(tmp_path / "run", trackers=["tensorbord", {"type": "comet_ml"}]), silent=True)
    assert caught.value.problems == [
        "trackers: unknown tracker 'tensorbord'. Did you mean 'tensorboard'?",
        "trackers: comet_ml is not installed. Run: pip install comet-ml",
    ]


class Told:
    """An accelerator that keeps what it is told."""

    def __init__(self) -> None:
        self.trackers: list[Any] = []
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def init_trackers(self, project: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        self.settings = {"project": project, **init_kwargs}

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))


@pytest.mark.parametrize("elsewhere", ["", "key", "environment"])
def test_wandb_keeps_its_files_in_the_run_folder_unless_they_are_to_be_elsewhere(
    tmp_path: Path, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_DIR", raising=False)
    if elsewhere == "environment":
        monkeypatch.setenv("WANDB_DIR", "somewhere")
    own = {"dir": "there"} if elsewhere == "key" else {}
    wanted = [{"type": "wandb", "project": "ink", "mode": "offline", **own}, "tensorboard"]
    told: Any = Told()
    training: Any = SimpleNamespace(run=toy_run(tmp_path / "run", trackers=wanted), folder=tmp_path / "run", step=3)
    tracker = Trackers(told)
    tracker.begin(training)
    place = {"": {"dir": str(tmp_path / "run/trackers")}, "key": own, "environment": {}}[elsewhere]
    assert told.settings == {"project": "ink", "wandb": {"mode": "offline", **place}, "tensorboard": {}}
    assert (tmp_path / "run/trackers").is_dir() == (not elsewhere)
    text = tmp_path / "step_000003_p0_s42.txt"
    text.write_text("one")
    tracker.sample(training, [text])
    assert told.logged == [(3, {"samples/p0_s42": "one"})]  # those of all steps are one series, as pictures are


def test_the_picture_of_the_metrics_has_what_there_is(tmp_path: Path) -> None:
    train(toy_run(tmp_path / "run", sample_every=2), silent=True)
    with Image.open(tmp_path / "run/metrics.png") as image:
        assert image.height > image.width * 0.8  # three panels: loss, rate, entropy
    assert not plot([{"step": 0, "entropy": 1.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_running_means_and_figures() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    records = [
        {"step": 0, "loss": 2.0, "perplexity": 7.4},
        {"step": 1, "loss": 5.0, "lr": 0.1},
        {"step": 1, "loss": 1.0},
    ]
    assert figures_in(records) == {"held-out loss": ([0, 1], [2.0, 1.0]), "perplexity": ([0], [7.4])}
