from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapterkit.errors import ConfigError, MissingDependencyError
from adapterkit.plugins import get_plugin_manager
from adapterkit.training.learner import Learner
from adapterkit.training.loop import train
from adapterkit.training.optimizers.adamw import AdamW
from adapterkit.training.rates import factor
from tests.training.test_loop import assert_same_run, losses
from tests.training.toy_task import ToyTask, toy_run

PACKAGES = {
    "adamw8bit": "bitsandbytes",
    "lion": "lion_pytorch",
    "prodigy": "prodigyopt",
    "schedule_free": "schedulefree",
}
OPTIMIZERS = list(get_plugin_manager().optimizers())


def usable(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason="pip install 'adapterkit[optimizers]'", exc_type=ImportError)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    usable(name)
    key: Any = {"type": name, "min_8bit_size": 16} if name == "adamw8bit" else name
    values: dict[str, Any] = {"optimizer": key, "learning_rate": None, "batch_size": 7, "steps": 14, "warmup_steps": 2}
    result = train(toy_run(tmp_path / "whole", **values), silent=True)
    assert result.figures["entropy"] < result.figures["base entropy"]
    options = {"signal_at": 7}
    stopped = train(toy_run(tmp_path / "parts", **values, options=options, checkpoint_every=None), silent=True)
    assert stopped.step == 7
    config = tmp_path / "parts/config.yaml"
    config.write_text(config.read_text().replace("signal_at: 7", "signal_at: null"))
    train(toy_run(tmp_path / "parts", **values), resume=True, silent=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_keys_of_an_optimizer_are_those_that_it_is_built_with(name: str) -> None:
    usable(name)
    cls = get_plugin_manager().optimizer(name).load()
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    config = cls()
    group = config.build([{"params": [parameter], "lr": 0.5, "weight_decay": 0.25}]).param_groups[0]
    told = {key: value for key, value in config.arguments().items() if key not in ("fused", "min_8bit_size")}
    assert {key: group.get(key, told[key]) for key in told} == told
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = get_plugin_manager().optimizer("lion")
    original = importlib.import_module

    def without(name: str, *arguments: Any) -> Any:
        if name == "adapterkit.training.optimizers.lion":
            raise ModuleNotFoundError("No module named 'lion_pytorch'", name="lion_pytorch")
        return original(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingDependencyError, match=r"'lion_pytorch'.*adapterkit\[optimizers\]"):
        spec.load()
    with pytest.raises(ConfigError, match=r"optimizer: .*'lion_pytorch'"):
        toy_run(tmp_path, optimizer="lion")


def test_the_optimizers_keys_are_checked_with_all_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        toy_run(tmp_path, "optimizer={type: adamw, beta: 1}", "scheduler={type: cosin}", "rates=[{select: 'a{'}]")
    found = "\n".join(caught.value.problems)
    assert "unknown key 'optimizer.beta'. Did you mean 'betas'?" in found
    assert "scheduler: unknown schedule 'cosin'. Did you mean 'cosine'?" in found
    assert "rates.0.select: " in found
    with pytest.raises(ConfigError, match=r"optimizer\.type: this key is required, a name such as 'adamw'"):
        toy_run(tmp_path, "optimizer={eps: 1e-6}")
    with pytest.raises(ConfigError, match=r"optimizer.*nesterov needs momentum"):
        toy_run(tmp_path, "optimizer={type: sgd, momentum: 0.0, nesterov: true}")


def test_a_run_file_says_all_of_the_optimizer_and_the_schedule(tmp_path: Path) -> None:
    found = toy_run(tmp_path, "optimizer={type: sgd, momentum: 0.5}", learning_rate=None).resolved()
    assert found["optimizer"] == {"type": "sgd", "momentum": 0.5, "dampening": 0.0, "nesterov": False}
    assert found["scheduler"] == {"type": "cosine", "restarts": 0, "decay": 1.0, "floor": 0.0}
    assert found["learning_rate"] == 0.01


SHAPES: dict[str, Any] = {
    "{type: linear, floor: 0.2}": lambda t: 1 - 0.8 * t,
    "{type: polynomial, power: 3}": lambda t: (1 - t) ** 3,
    "{type: cosine, floor: 0.1}": lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2,
    "{type: cosine, restarts: 1, decay: 0.5}": lambda t: (
        (1 if t < 0.5 else 0.5) * (1 + math.cos(math.pi * (2 * t % 1))) / 2
    ),
    "{type: inverse_sqrt, timescale: 10}": lambda t: 1 / math.sqrt(1 + 20 * t / 10),
    "{type: stable_decay, decay: 0.25}": lambda t: min(1.0, (1 - t) / 0.25),
}


@pytest.mark.parametrize("schedule", SHAPES)
def test_schedules_have_their_shapes(schedule: str) -> None:
    run = toy_run(Path("out"), f"scheduler={schedule}", steps=20)
    assert [factor(run, step) for step in range(20)] == pytest.approx([SHAPES[schedule](i / 20) for i in range(20)])
    assert 0 <= run.schedule.factor(20, 20) <= 1  # a step behind the last is no error


def test_rates_go_by_selector_and_multiply_what_the_type_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, tuple[float, float]]] = []

    def watch(self: AdamW, groups: Any) -> Any:
        optimizer = torch.optim.AdamW(groups)
        seen.append({})
        names = {id(p): name for name, p in learners[0].trained.named.items()}
        for group in optimizer.param_groups:
            seen[-1].update({names[id(p)]: (group["lr"], group["weight_decay"]) for p in group["params"]})
        return optimizer

    learners: list[Learner] = []
    original = Learner._build_optimizer
    monkeypatch.setattr(Learner, "_build_optimizer", lambda self: (learners.append(self), original(self))[1])
    monkeypatch.setattr(AdamW, "build", watch)
    monkeypatch.setattr(ToyTask, "extra_modules", lambda self: {"head": self.model.head})
    rates = [
        {"select": "attn.*", "learning_rate": 0.5},
        {"select": "attn.q@layer>=1", "weight_decay": 0.0},
        {"select": "head", "learning_rate": 0.125},
    ]
    adapter = {"type": "lora", "rank": 2, "targets": "attn.{q,v} mlp.up", "plus": 4.0}
    train(toy_run(tmp_path / "run", adapter=adapter, rates=rates, steps=1, weight_decay=0.1), silent=True)
    [found] = seen
    assert found["attn.v@toy.1/A"] == (0.5, 0.1)
    assert found["attn.v@toy.1/B"] == (2.0, 0.1)
    assert found["attn.q@toy.0/A"] == (0.5, 0.1)
    assert found["attn.q@toy.1/A"] == (0.01, 0.0)  # the last that selects it
    assert found["mlp.up@toy.0/B"] == (0.04, 0.1)
    assert found["head.weight"] == (0.125, 0.1)


def test_a_selector_of_nothing_that_trains_is_told(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", "rates=[{select: 'mlp.down', learning_rate: 1e-3}]", "adapter.targets=mlp.up")
    with pytest.raises(ConfigError, match=r"rates: 'mlp\.down' selects nothing that trains; what does: mlp\.up"):
        train(run, silent=True)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_of_one_rate_refuses_several(tmp_path: Path) -> None:
    usable("prodigy")
    run = toy_run(tmp_path / "run", "adapter.plus=4.0", optimizer="prodigy", learning_rate=None)
    with pytest.raises(ConfigError, match="one learning rate for all parameters, and there are 1, 4"):
        train(run, silent=True)


def test_samples_figures_and_files_are_of_the_running_average(tmp_path: Path) -> None:
    """After step t it is d mean + (1 - d) value with d = min(decay, (1 + t) / (10 + t)), from the start's value."""
    values: dict[str, Any] = {"steps": 5, "checkpoint_every": 1, "keep_checkpoints": 10}
    train(toy_run(tmp_path / "plain", **values, ema=None), silent=True)
    result = train(toy_run(tmp_path / "mean", **values, ema=0.25), silent=True)
    assert losses(tmp_path / "plain") == losses(tmp_path / "mean")
    key = "a/attn.q@toy.0/B"
    files = [load_file(tmp_path / f"plain/checkpoints/step-{step:06d}/adapter.safetensors") for step in range(1, 6)]
    key = next(name for name in files[0] if name.endswith("/B"))
    expected = torch.zeros_like(files[0][key])
    for step, file in enumerate(files, 1):
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * file[key]
        folder = tmp_path / f"mean/checkpoints/step-{step:06d}"
        torch.testing.assert_close(load_file(folder / "adapter.safetensors")[key], expected, rtol=1e-5, atol=1e-9)
        training = load_file(folder / "training.safetensors")
        assert any(torch.equal(value, file[key]) for value in training.values())
    torch.testing.assert_close(load_file(tmp_path / "mean/adapter.safetensors")[key], expected, rtol=1e-5, atol=1e-9)
    plain = train(toy_run(tmp_path / "again", **values), silent=True)
    assert result.figures["entropy"] != plain.figures["entropy"]


def test_a_run_with_an_average_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyTask, "extra_modules", lambda self: {"head": self.model.head})
    values: dict[str, Any] = {"ema": 0.9, "scheduler": "constant", "sample_every": 2}
    train(toy_run(tmp_path / "whole", **values), silent=True)
    train(toy_run(tmp_path / "parts", **values, steps=5), silent=True)
    train(toy_run(tmp_path / "parts", **values), resume=True, silent=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    whole, parts = (load_file(tmp_path / run / "head.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_an_average_of_an_average_is_refused(tmp_path: Path) -> None:
    usable("schedule_free")
    with pytest.raises(ConfigError, match="ema: the optimizer averages by itself"):
        toy_run(tmp_path, optimizer="schedule_free", ema=0.9)


@pytest.mark.slow
def test_the_parts_that_the_adapter_acts_in_are_compiled(tmp_path: Path) -> None:
    values: dict[str, Any] = {"steps": 2, "sample_every": 1}
    train(toy_run(tmp_path / "eager", **values), silent=True)
    compiled: Any = {"backend": "aot_eager"}
    train(toy_run(tmp_path / "compiled", **values, torch_compile=compiled), silent=True)
    pairs = zip(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True)
    assert all(one["loss"] == pytest.approx(other["loss"], rel=1e-4) for one, other in pairs)
    with pytest.raises(Exception, match="never"):
        train(toy_run(tmp_path / "other", **values, torch_compile={"backend": "never"}), silent=True)
    assert toy_run(tmp_path, torch_compile=True).resolved()["torch_compile"]["backend"] == "inductor"
    assert toy_run(tmp_path, torch_compile=False).config.torch_compile is None
