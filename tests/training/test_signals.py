"""What a signal does to a run, wherever it comes: nothing that was made is lost, and nothing is left in the way."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapterkit.errors import StateError
from adapterkit.training.learner import Learner
from adapterkit.training.loop import finish, train
from adapterkit.training.run_folder import read_metrics
from adapterkit.training.snapshots import Snapshots
from tests.training.test_loop import assert_same_run
from tests.training.toy_task import ToyTask, toy_run

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send_from(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, number: int, *, at: int = 1, times: int = 1
) -> None:
    """Sends the process a signal in the call number `at` of a method, before it does its work."""
    original, calls = getattr(owner, name), []

    def send(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self, *arguments, **named)

    monkeypatch.setattr(owner, name, send)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("place", ["survey", "load_model", "prepare", "evaluate", "generate", "extra_modules"])
def test_before_the_first_step_it_stops_at_once_and_leaves_no_folder(
    place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    send_from(monkeypatch, ToyTask, place, number)
    stopped = train(toy_run(tmp_path / "run"))
    assert (stopped.exit_code, stopped.step, stopped.adapter, stopped.saved) == (128 + number, 0, None, None)
    assert not (tmp_path / "run").exists()
    assert f"{signal.Signals(number).name}: stopping; no step has been made" in capfd.readouterr().err
    assert train(toy_run(tmp_path / "run"), silent=True).step == 8  # the folder is in nobody's way


def test_what_was_in_the_folder_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(toy_run(tmp_path / "run", steps=4, scheduler="constant"), silent=True)
    send_from(monkeypatch, ToyTask, "load_model", signal.SIGINT)
    stopped = train(toy_run(tmp_path / "run", scheduler="constant"), resume=True, silent=True)
    assert (stopped.exit_code, stopped.saved) == (130, 4)
    assert (tmp_path / "run/adapter.safetensors").exists()
    assert train(toy_run(tmp_path / "run", scheduler="constant"), resume=True, silent=True).step == 8


def test_an_error_before_the_first_step_leaves_no_folder_either(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the loss of step 1 is nan"):
        train(toy_run(tmp_path / "run", options={"poison": 1}), silent=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["evaluate", "generate"])
def test_samples_on_the_way_are_broken_off_for_a_checkpoint(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"sample_every": 3, "checkpoint_every": None}
    train(toy_run(tmp_path / "whole", **values), silent=True)
    with monkeypatch.context() as patch:
        send_from(patch, ToyTask, place, signal.SIGTERM, at=2 if place == "evaluate" else 3)
        stopped = train(toy_run(tmp_path / "run", **values), silent=True)
    assert (stopped.exit_code, stopped.step, stopped.saved) == (143, 3, 3)
    train(toy_run(tmp_path / "run", **values), resume=True, silent=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("times", [1, 2])
def test_a_checkpoint_that_is_being_written_is_written(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_from(monkeypatch, Snapshots, "write", signal.SIGINT, at=2, times=times)
    stopped = train(toy_run(tmp_path / "run"), silent=True)
    assert stopped.exit_code == 130
    assert stopped.saved in (4, 5)
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} >= {"step-000004"}


@pytest.mark.parametrize("times", [1, 2])
def test_after_the_last_step_the_adapter_is_written_first(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train(toy_run(tmp_path / "whole"), silent=True)
    with monkeypatch.context() as patch:
        send_from(patch, Snapshots, "write", signal.SIGHUP, at=4, times=times)  # of the last step
        stopped = train(toy_run(tmp_path / "run"))
    assert (stopped.exit_code, stopped.step) == (129, 8)
    assert stopped.adapter == tmp_path / "run/adapter.safetensors"
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert "stopping when the file is written" in capfd.readouterr().err
    assert not (tmp_path / "run/samples/step_000008_p0_s42.txt").exists()
    again = train(toy_run(tmp_path / "run"), resume=True, silent=True)
    assert (again.exit_code, again.finished_before) == (0, False)  # samples and figures were left
    assert (tmp_path / "run/samples/step_000008_p0_s42.txt").exists()


def test_in_the_last_samples_the_adapter_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send_from(monkeypatch, ToyTask, "generate", signal.SIGINT, at=3)
    stopped = train(toy_run(tmp_path / "run"), silent=True)
    assert (stopped.exit_code, stopped.step, stopped.adapter) == (130, 8, tmp_path / "run/adapter.safetensors")
    assert math.isfinite(stopped.loss)


@pytest.mark.parametrize("at", [3, 4, 5, 7])
def test_a_signal_just_before_something_is_shown_ends_the_run_as_one_within(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the model is being made ready for it: it was a RuntimeError."""
    send_from(monkeypatch, Learner, "shown", signal.SIGINT, at=at)
    stopped = train(toy_run(tmp_path / "run", sample_every=4), silent=True)
    assert (stopped.exit_code, stopped.saved) == (130, stopped.step)
    assert train(toy_run(tmp_path / "run", sample_every=4), resume=True, silent=True).exit_code == 0


def test_an_interrupted_run_is_finished_with_what_it_has_and_still_resumes(tmp_path: Path) -> None:
    values: dict[str, Any] = {"checkpoint_every": 2}
    train(toy_run(tmp_path / "whole", **values), silent=True)
    options = {"signal_at": 5}
    train(toy_run(tmp_path / "run", options=options, **values), silent=True)
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("signal_at: 5", "signal_at: null"))
    before = config.read_text()
    result = finish(tmp_path / "run", silent=True)
    assert (result.step, result.adapter, result.exit_code) == (5, tmp_path / "run/adapter.safetensors", 0)
    assert result.figures["base entropy"] > 0
    assert (tmp_path / "run/samples/step_000005_p1_s42.txt").exists()
    at_five = load_file(tmp_path / "run/checkpoints/step-000005/adapter.safetensors")
    assert all(
        torch.equal(value, at_five[key]) for key, value in load_file(tmp_path / "run/adapter.safetensors").items()
    )
    assert config.read_text() == before
    earlier = finish(tmp_path / "run", step=4, silent=True)
    assert earlier.step == 4
    assert len([r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r]) == 5
    resumed = train(toy_run(tmp_path / "run", **values), resume=True, silent=True)
    assert resumed.step == 8
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(StateError, match=r"no checkpoint of step 3; there are 6, 8"):
        finish(tmp_path / "run", step=3, silent=True)
    with pytest.raises(StateError, match="holds no run"):
        finish(tmp_path / "nothing", silent=True)
