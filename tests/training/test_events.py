from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

import adapterkit as ak
from adapterkit.errors import ConfigError, PluginError
from adapterkit.specs import CallbackSpec
from adapterkit.training.config import Section
from adapterkit.training.events import Callback, Training
from adapterkit.training.loop import train
from adapterkit.training.result import Result
from tests.training.test_loop import losses
from tests.training.toy_task import toy_run

HEARD: list[tuple[Any, ...]] = []


class Options(Section):
    stop_at: int | None = Field(None, gt=0)
    fail_at: int | None = None


class Listener(Callback):
    """Writes down what it is told."""

    Options = Options
    options: Options

    def begin(self, training: Training) -> None:
        HEARD.append(("begin", training.step, len(training.history), training.run.config.steps))

    def step(self, training: Training, record: Mapping[str, Any]) -> None:
        HEARD.append(("step", training.step, record["loss"], record["lr"]))
        if training.step == self.options.stop_at:
            training.stop("enough")
        if training.step == self.options.fail_at:
            raise KeyError("boom")

    def evaluate(self, training: Training, figures: Mapping[str, float]) -> None:
        HEARD.append(("evaluate", training.step, figures["entropy"]))

    def save(self, training: Training, folder: Path) -> None:
        HEARD.append(("save", training.step, folder.name))

    def sample(self, training: Training, files: Sequence[Path]) -> None:
        HEARD.append(("sample", training.step, [file.is_file() for file in files]))

    def end(self, training: Training, result: Result) -> None:
        HEARD.append(("end", result.step, result.exit_code))


@ak.hookimpl
def adapterkit_register_callbacks() -> list[CallbackSpec]:
    return [CallbackSpec("listener", f"{__name__}:Listener", summary="for tests")]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    manager = ak.get_plugin_manager()
    manager.register(sys.modules[__name__], name="listeners")
    HEARD.clear()
    yield
    manager.unregister(name="listeners")


def test_callbacks_are_told_of_everything_in_order(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", callbacks=["listener"], steps=4, sample_every=3, evaluate_every=2)
    train(run, silent=True)
    there = [True, True]
    assert [heard[:2] for heard in HEARD] == [
        ("begin", 0),
        ("evaluate", 0),
        ("sample", 0),
        ("step", 1),
        ("step", 2),
        ("save", 2),
        ("evaluate", 2),
        ("step", 3),
        ("sample", 3),
        ("step", 4),
        ("save", 4),
        ("evaluate", 4),
        ("sample", 4),
        ("end", 4),
    ]
    assert all(heard[2] == there for heard in HEARD if heard[0] == "sample")
    assert [heard[2] for heard in HEARD if heard[0] == "step"] == [r["loss"] for r in losses(tmp_path / "run")]
    assert HEARD[-1] == ("end", 4, 0)


def test_they_are_told_of_a_signal_and_of_what_was_before(tmp_path: Path) -> None:
    train(toy_run(tmp_path / "run", callbacks=["listener"], steps=4, options={"signal_at": 3}), silent=True)
    assert HEARD[-2:] == [("save", 3, "step-000003"), ("end", 3, 143)]
    HEARD.clear()
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("signal_at: 3", "signal_at: null"))
    train(toy_run(tmp_path / "run", callbacks=["listener"], steps=4), resume=True, silent=True)
    assert HEARD[0] == ("begin", 3, 4, 4)  # three steps, and the base's figures
    assert [heard[:2] for heard in HEARD][1:3] == [("step", 4), ("save", 4)]


def test_one_may_end_the_run_which_can_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, Any] = {"scheduler": "constant"}
    result = train(toy_run(tmp_path / "run", callbacks=[{"type": "listener", "stop_at": 3}], **values))
    assert (result.step, result.exit_code) == (3, 0)
    assert result.adapter == tmp_path / "run/adapter.safetensors"
    assert "ending here; enough" in capsys.readouterr().err
    assert train(toy_run(tmp_path / "run", **values), resume=True, silent=True).step == 8
    train(toy_run(tmp_path / "whole", **values), silent=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_one_that_fails_is_named(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", callbacks=[{"type": "listener", "fail_at": 3}])
    with pytest.raises(PluginError, match="callback Listener: step raised KeyError: 'boom'") as caught:
        train(run, silent=True)
    assert caught.value.plugin == "listeners"
    assert HEARD[-1][0] == "end"


def test_their_keys_are_checked_with_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        toy_run(tmp_path, callbacks=["listner", {"type": "listener", "stop": 3}])
    assert any("callbacks.0: unknown callback 'listner'. Did you mean 'listener'?" in p for p in caught.value.problems)
    assert any("callbacks.1.stop" in problem for problem in caught.value.problems)
