from __future__ import annotations

import os
import signal
from pathlib import Path

import yaml
from click.testing import CliRunner

from adapterkit.cli import adapters
from adapterkit.cli.main import main
from adapterkit.training.loop import train
from tests.training.toy_task import ToyTask, toy_run


def test_an_interrupted_run_is_finished_from_the_command_line(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", options={"signal_at": 4})
    stopped = train(run, silent=True)
    assert (stopped.step, stopped.adapter) == (4, None)
    done = CliRunner().invoke(main, ["finish", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "entropy" in done.output
    assert str(tmp_path / "run/adapter.safetensors") in done.output
    none = CliRunner().invoke(main, ["finish", str(tmp_path / "run"), "--step", "3"])
    assert none.exit_code == 1
    assert "no checkpoint of step 3; there are 2, 4" in none.output


def test_a_stopped_run_says_both_ways_on(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**toy_run(tmp_path / "run", options={"signal_at": 3}).resolved()}))
    stopped = CliRunner().invoke(main, ["train", str(file)])
    assert stopped.exit_code == 143
    assert f"to go on: adapterkit train {file} --resume" in stopped.output
    assert f"to end here with the adapter and samples: adapterkit finish {tmp_path / 'run'}" in stopped.output


def test_a_signal_before_the_first_step_is_told(tmp_path: Path, monkeypatch) -> None:

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(toy_run(tmp_path / "run").resolved()))
    monkeypatch.setattr(ToyTask, "load_model", lambda self: os.kill(os.getpid(), signal.SIGINT))
    stopped = CliRunner().invoke(main, ["train", str(file)])
    assert stopped.exit_code == 130
    assert "stopped before the first step, and nothing is left behind" in stopped.output


def test_a_signal_to_any_other_command_is_exit_code_130(monkeypatch) -> None:

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapters.command, "callback", stop)
    assert CliRunner().invoke(main, ["adapters"]).exit_code == 130
