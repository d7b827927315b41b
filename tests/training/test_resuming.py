from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapterkit as ak
from adapterkit.errors import ConfigError
from adapterkit.testing import toys
from adapterkit.training.loop import train
from adapterkit.training.resuming import consequences
from tests.training.test_loop import assert_same_run, losses
from tests.training.toy_task import EXAMPLES, ToyTask, toy_run


def test_every_key_that_differs_is_named_with_its_section(tmp_path: Path) -> None:
    train(toy_run(tmp_path / "run", steps=2), silent=True)
    with pytest.raises(ConfigError) as caught:
        train(
            toy_run(tmp_path / "run", "adapter.rank=4", "options.scale=2.0", optimizer={"type": "adamw", "eps": 1e-6}),
            resume=True,
            silent=True,
        )
    assert caught.value.problems == [
        "adapter.rank is 4, but the run began with 2",
        "options.scale is 2.0, but the run began with 1.0",
        "optimizer.eps is 1e-06, but the run began with 1e-08",
        "only a run of the same configuration can be resumed",
    ]


def test_what_changes_no_step_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(toy_run(tmp_path / "whole", scheduler="constant"), silent=True)
    train(toy_run(tmp_path / "run", scheduler="constant", steps=4), silent=True)
    monkeypatch.setattr(ToyTask, "free_options", frozenset({"signals"}))
    other = toy_run(tmp_path / "run", "options.signals=3", scheduler="constant", sample_every=1, log_every=3)
    train(other, resume=True, silent=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_of_an_earlier_release_lacks_keys_that_have_defaults_now(tmp_path: Path) -> None:
    train(toy_run(tmp_path / "run", scheduler="constant", steps=4), silent=True)
    config = tmp_path / "run/config.yaml"
    lines = config.read_text().replace("scheduler:\n  type: constant", "scheduler: constant").splitlines()
    assert "scheduler: constant" in lines
    dropped = [line for line in lines if not line.startswith(("ema:", "epochs:", "init_from:", "rates:"))]
    config.write_text("\n".join(dropped) + "\n")
    assert train(toy_run(tmp_path / "run", scheduler="constant"), resume=True, silent=True).step == 8


def test_more_steps_say_what_becomes_of_the_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(toy_run(tmp_path / "run", steps=8, scheduler="linear"), silent=True)
    train(toy_run(tmp_path / "run", steps=16, scheduler="linear"), resume=True)
    assert (
        "steps is 16, and the run began with 8: the schedule linear is drawn over them anew, so the learning rate of "
        "step 9 is 5.00e-03, where that of step 8 was 1.25e-03"
    ) in capsys.readouterr().err
    before = toy_run(tmp_path, steps=8, scheduler="constant")
    assert consequences(before, toy_run(tmp_path, steps=80, scheduler="constant"), 8) == []
    assert consequences(before, before, 4) == []


def test_resume_with_nothing_there_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(toy_run(tmp_path / "run", steps=2), resume=True)
    assert f"there is no checkpoint in {tmp_path / 'run'} to resume" in capsys.readouterr().err


def test_a_finished_run_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(toy_run(tmp_path / "run"), silent=True)
    monkeypatch.setattr(ToyTask, "load_model", lambda self: pytest.fail("nothing need be loaded"))
    again = train(toy_run(tmp_path / "run", sample_every=2), resume=True, silent=True)
    assert again == dataclasses.replace(first, finished_before=True, speed="", peak_memory=0)
    assert again.loss == pytest.approx(sum(r["loss"] for r in losses(tmp_path / "run")) / 8)


def test_epochs_become_steps(tmp_path: Path) -> None:
    values: dict[str, Any] = {"batch_size": 2, "gradient_accumulation": 2}
    run = toy_run(tmp_path / "whole", "epochs=2.5", **values, steps=None)
    result = train(run, silent=True)
    assert result.step == -(-EXAMPLES * 5 // 8)  # 2.5 epochs, four examples a step, and the last step is whole
    assert losses(tmp_path / "whole")[-1]["lr"] < 5e-3  # the schedule is drawn over them
    train(toy_run(tmp_path / "parts", "epochs=1", **values, steps=None, scheduler="constant"), silent=True)
    longer = train(
        toy_run(tmp_path / "parts", "epochs=2", **values, steps=None, scheduler="constant"), resume=True, silent=True
    )
    assert longer.step == 4
    same = toy_run(tmp_path / "parts", "epochs=2", **values, steps=None, scheduler="constant")
    assert train(same, resume=True, silent=True).finished_before
    with pytest.raises(ConfigError, match="epochs: is 2, and steps is 8; give one of them"):
        toy_run(tmp_path, "epochs=2")


@pytest.mark.parametrize("format", ["native", "peft"])
def test_a_run_begins_with_the_values_of_a_file(format: str, tmp_path: Path) -> None:
    toys.register()
    adapters = ak.Adapters(toys.ToyModel(seed=3))
    adapters.add("a", ak.LoRA(rank=2, targets="attn.* mlp.*", dropout=0.3))
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    path = tmp_path / ("a.safetensors" if format == "native" else "a")
    adapters.save("a", path, format=format)
    train(toy_run(tmp_path / "run", init_from=str(path), steps=1, learning_rate=1e-30), silent=True)
    found, given = load_file(tmp_path / "run/adapter.safetensors"), adapters.state_dict("a")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in given.items())


def test_a_file_that_does_not_fit_is_told_before_a_folder_is_left(tmp_path: Path) -> None:
    adapters = ak.Adapters(toys.ToyModel(seed=3))
    adapters.add("a", ak.LoRA(rank=3, targets="attn.*"))
    adapters.save("a", tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="init_from: "):
        train(toy_run(tmp_path / "run", init_from=str(tmp_path / "a.safetensors")), silent=True)
    assert not (tmp_path / "run").exists()
