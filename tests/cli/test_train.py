from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from adapterkit.cli.main import main
from adapterkit.training import yaml_values
from adapterkit.training.run_folder import read_metrics
from tests.cli.launched import PROGRAM, together
from tests.training import toy_task


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run of the toy task, eight short steps into tmp_path/run."""
    toy_task.register()
    path = tmp_path / "run.yaml"
    path.write_text(yaml_values.dump({**toy_task.toy_run(tmp_path / "run").resolved(), "versions": {}}))
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def test_results_go_to_stdout_and_messages_to_stderr(run_file: Path, tmp_path: Path):
    result = call(run_file, "log_every=4", "steps=5")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["steps", "5"]
    assert f"{tmp_path}/run/adapter.safetensors (" in result.stdout
    assert "base entropy" in result.stdout
    lines = result.stderr.splitlines()
    assert lines[:2] == ["override log_every=4", "override steps=5"]
    assert lines[2].startswith("training 448 of 1,944 ")
    assert "at 12 points (attn.k, attn.o, attn.q, attn.v, mlp.down, mlp.up)" in lines[2]
    assert lines[3] == "7 examples from toy"
    assert [line.split("  ")[0] for line in lines if line.startswith("step") and "/" in line and "loss" in line] == [
        "step 4/5",
        "step 5/5",
    ]


def test_the_command_to_go_on_with_is_quoted_for_a_shell(run_file: Path):
    result = call(run_file, "options.signal_at=3", "options.signal_number=2", "adapter.targets=attn.q attn.v")
    assert f"adapterkit train {run_file} " in result.stderr
    assert "'adapter.targets=attn.q attn.v' --resume" in result.stderr


def test_a_missing_library_is_named_with_what_installs_it(run_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "adapterkit.training.loop", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setitem(sys.modules, "accelerate.state", None)
    result = call(run_file)
    assert result.exit_code == 1
    assert "error: training needs 'accelerate', which is not installed. Run: pip install 'adapter" in result.stderr


def test_what_the_system_refuses_is_one_line(run_file: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    result = call(run_file, f"output={tmp_path}/file/run")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: output {tmp_path}/file/run cannot be made: Not a directory; choose another folder with output=FOLDER"
    )


def test_an_interrupted_run_says_how_to_go_on_and_does(run_file: Path, tmp_path: Path):
    result = call(run_file, "options.signal_at=3", "options.signal_number=2")
    assert result.exit_code == 130
    again = f"adapterkit train {run_file} options.signal_at=3 options.signal_number=2 --resume"
    assert f"stopped after step 3; a checkpoint is saved\nto go on: {again}\n" in result.stderr
    # The signal comes again at the third call: step 6 of the resumed run, and then no more.
    assert call(*again.split()[2:]).exit_code == 130
    last = call(*again.split()[2:])
    assert last.exit_code == 0, last.output
    assert [r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r] == list(range(1, 9))


def test_a_dry_run_shows_points_and_writes_nothing(run_file: Path, tmp_path: Path):
    result = call(run_file, "--dry-run", "adapter.targets=mlp.up", "adapter.rank=3")
    assert result.exit_code == 0, result.output
    assert "2 points  +144 parameters" in result.stdout
    assert "rank: 3" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("stepz=3",), 1, "unknown key 'stepz'. Did you mean 'steps'?"),
        (("adapter.targets=attn.qq",), 1, "'attn.qq' is unknown here"),
        (("adapter.type=bottleneck", "adapter.rank=2"), 1, "unknown key 'adapter.rank'"),
        (("--dry-run", "trackers=[tensorbord]"), 1, "unknown tracker 'tensorbord'. Did you mean 'tensorboard'?"),
        (("--resume", "--overwrite"), 2, "exclude each other"),
        (("--no-such",), 2, "No such option"),
    ],
)
def test_errors_are_one_line_without_a_traceback(
    run_file: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
):
    result = call(run_file, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_change_in_the_place_of_the_run_file_is_told_where_it_belongs():
    result = call("task=causal-lm", "steps=3")
    assert result.exit_code == 2
    assert "adapterkit train RUN.YAML task=causal-lm" in result.stderr


def test_a_used_folder_is_refused_with_the_flags_that_mend_it(run_file: Path):
    assert call(run_file, "steps=1").exit_code == 0
    refused = call(run_file, "steps=1")
    assert refused.exit_code == 1
    assert "--resume" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert call(run_file, "steps=1", "--overwrite").exit_code == 0


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM.format(""), "train", *map(str, arguments)]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and any(record["step"] >= step for record in read_metrics(metrics)):
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_exits(run_file: Path, tmp_path: Path, number: signal.Signals):
    """As a terminal or a scheduler sends it: the processes that read data get it too."""
    process = start(run_file, "steps=5000", "gradient_accumulation=3", "num_workers=2")
    wait_for_step(tmp_path / "run", 5, process)
    os.killpg(process.pid, number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "to go on: adapterkit train" in messages
    steps = [r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert (tmp_path / f"run/checkpoints/step-{steps[-1]:06d}/state.json").exists()


@pytest.mark.slow
def test_an_error_while_processes_read_data_ends_them_too(run_file: Path):
    process = start(run_file, "options.poison=2", "num_workers=2")
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: the loss of step 2 is nan" in messages


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_that_are_killed_and_resumed_equal_one_that_is_not(run_file: Path, tmp_path: Path):
    """kill -9 at a step, at any moment of it; each time the run goes on from a checkpoint that is whole."""
    arguments = ("steps=400", "checkpoint_every=1", "num_workers=0")
    for step in range(40, 400, 60):
        process = start(run_file, *arguments, "--resume")
        wait_for_step(tmp_path / "run", step, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(run_file, *arguments, "--resume")
    process.communicate()
    assert process.returncode == 0
    whole = start(run_file, *arguments, f"output={tmp_path / 'whole'}")
    whole.communicate()
    assert whole.returncode == 0
    assert (tmp_path / "run/adapter.safetensors").read_bytes() == (tmp_path / "whole/adapter.safetensors").read_bytes()
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(tmp_path / f / "metrics.jsonl") if "loss" in r]
        for f in ("run", "whole")
    ]
    assert losses[0] == losses[1]


def test_two_processes_train_as_one_with_batches_twice_as_large(run_file: Path, tmp_path: Path):
    """Over gloo, without dropout: the averaged gradients of two halves are the gradient of the whole."""
    config = yaml_values.parse(run_file.read_text())
    config["adapter"]["dropout"] = 0.0
    run_file.write_text(yaml_values.dump(config))
    done = together(tmp_path, "train", run_file, f"output={tmp_path / 'two'}", "batch_size=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss (last steps)") == 1
    assert done.stderr.count("override batch_size=2") == 1
    assert call(run_file, f"output={tmp_path / 'one'}", "batch_size=4").exit_code == 0
    two, one = ([r for r in read_metrics(tmp_path / f / "metrics.jsonl") if "loss" in r] for f in ("two", "one"))
    assert len(two) == len(one) == 8
    for mine, theirs in zip(two, one, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    files = [load_file(tmp_path / folder / "adapter.safetensors") for folder in ("two", "one")]
    for name, tensor in files[0].items():
        torch.testing.assert_close(tensor, files[1][name], rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "two/checkpoints/step-000008/state.json").read_text())["step"] == 8
