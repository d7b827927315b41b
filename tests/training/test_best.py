from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapterkit.errors import ConfigError
from adapterkit.training.loop import finish, train
from adapterkit.training.run_folder import read_metrics
from tests.training.toy_task import ToyTask, toy_run

VALUES: dict[str, Any] = {"evaluate_every": 2, "keep_checkpoints": 9, "best": "score"}
SCORES = [9.0, 3.0, 1.0, 2.0, 2.5]  # of the base, and after 2, 4, 6 and 8 steps


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the task measures, one after the other; the last one over and over."""
    left = list(SCORES)
    monkeypatch.setattr(ToyTask, "evaluate", lambda self: {"score": left.pop(0) if len(left) > 1 else left[0]})
    return left


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("scores")
def test_the_run_ends_with_the_best_of_the_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ToyTask, "extra_modules", lambda self: {"head": self.model.head})
    result = train(toy_run(tmp_path / "run", **VALUES))
    run, four = tmp_path / "run", tmp_path / "run/checkpoints/step-000004"
    for name in ("adapter", "head"):
        assert same(run / f"{name}.safetensors", four / f"{name}.safetensors")
        assert same(run / f"best/{name}.safetensors", four / f"{name}.safetensors")
    assert json.loads((run / "best/best.json").read_text()) == {
        "step": 4,
        "figure": "score",
        "value": 1.0,
        "worse": [6, 8],
    }
    assert result.step == 8
    assert "ending with the best, step 4: score 1" in capsys.readouterr().err
    assert [r["score"] for r in read_metrics(run / "metrics.jsonl") if "score" in r] == SCORES


@pytest.mark.parametrize(("mode", "step"), [("max", 2), ("min", 4)])
@pytest.mark.usefixtures("scores")
def test_more_may_be_better(mode: str, step: int, tmp_path: Path) -> None:
    values = {**VALUES, "best": {"figure": "score", "mode": mode}}
    train(toy_run(tmp_path / "run", **values), silent=True)
    assert json.loads((tmp_path / "run/best/best.json").read_text())["step"] == step


@pytest.mark.usefixtures("scores")
def test_the_task_knows_of_which_figures_more_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyTask, "larger_is_better", frozenset({"score"}))
    train(toy_run(tmp_path / "run", **VALUES), silent=True)
    assert json.loads((tmp_path / "run/best/best.json").read_text())["step"] == 2


@pytest.mark.usefixtures("scores")
def test_a_run_that_gets_no_better_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(toy_run(tmp_path / "run", **VALUES, early_stop=1))
    assert (result.step, result.exit_code) == (6, 0)
    assert "ending here; the best of 2 evaluations is step 4: score 1" in capsys.readouterr().err
    assert same(tmp_path / "run/adapter.safetensors", tmp_path / "run/checkpoints/step-000004/adapter.safetensors")


@pytest.mark.usefixtures("scores")
def test_a_resumed_run_knows_the_best_of_before(tmp_path: Path) -> None:
    train(toy_run(tmp_path / "run", **VALUES, steps=6, scheduler="constant"), silent=True)
    train(toy_run(tmp_path / "run", **VALUES, scheduler="constant"), resume=True, silent=True)
    assert same(tmp_path / "run/adapter.safetensors", tmp_path / "run/checkpoints/step-000004/adapter.safetensors")
    later = finish(tmp_path / "run", step=6, silent=True)
    assert later.step == 6
    assert same(tmp_path / "run/adapter.safetensors", tmp_path / "run/checkpoints/step-000006/adapter.safetensors")


@pytest.mark.usefixtures("scores")
def test_the_best_of_an_average_is_the_average(tmp_path: Path) -> None:
    train(toy_run(tmp_path / "run", **VALUES, ema=0.5), silent=True)
    assert same(tmp_path / "run/adapter.safetensors", tmp_path / "run/checkpoints/step-000004/adapter.safetensors")


def test_a_figure_that_is_not_measured_is_told_before_a_step_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"best: the task measures no 'entropi'. Did you mean 'entropy'\?"):
        train(toy_run(tmp_path / "run", best="entropi"), silent=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="early_stop: say with `best` by which figure"):
        toy_run(tmp_path, early_stop=3)


@pytest.mark.usefixtures("scores")
def test_an_early_end_measures_and_draws_its_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(toy_run(tmp_path / "run", **VALUES, early_stop=1, sample_every=2))
    told = capsys.readouterr().err
    assert told.count("step 6: score 2\n") == 1
    assert told.count("step 6: 2 samples in") == 1
    records = [r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "score" in r]
    assert records == [0, 2, 4, 6]
    assert json.loads((tmp_path / "run/best/best.json").read_text())["worse"] == [6]


@pytest.mark.usefixtures("scores")
def test_evaluations_that_are_made_again_are_counted_once(tmp_path: Path) -> None:
    """A run that was killed goes on from a checkpoint that is older than what it has measured."""
    values = {**VALUES, "scheduler": "constant"}
    train(toy_run(tmp_path / "run", **values), silent=True)
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:06d}")
    again = train(toy_run(tmp_path / "run", **values, early_stop=3), resume=True, silent=True)
    assert again.step == 8
    assert json.loads((tmp_path / "run/best/best.json").read_text())["worse"] == [6, 8]


def test_what_is_no_number_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [9.0, math.nan, 3.0, math.nan]
    monkeypatch.setattr(ToyTask, "evaluate", lambda self: {"score": left.pop(0) if len(left) > 1 else left[0]})
    train(toy_run(tmp_path / "run", **VALUES), silent=True)
    assert json.loads((tmp_path / "run/best/best.json").read_text())["step"] == 4


def test_a_run_may_measure_no_number_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ToyTask, "evaluate", lambda self: {"score": math.nan})
    assert train(toy_run(tmp_path / "run", **VALUES, early_stop=2)).step == 4
    assert "the best of 2 evaluations is none, for score was never a number" in capsys.readouterr().err
