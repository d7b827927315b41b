"""Tasks that strangers have written: what is wrong with one is said, by name, before anything is lost."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.specs import TaskSpec
from adapterkit.testing import toys
from adapterkit.training.loop import train
from adapterkit.training.run import load_run
from adapterkit.training.state import Trainable, Trained, load_modules, own_parameters, save_modules
from tests.training.toy_task import Sequences, ToyTask, toy_run


def raising(*_: object) -> Any:
    raise KeyError("boom")


METHODS: dict[str, tuple[Any, str]] = {
    "load_model": (lambda self: None, "returned None; expected a torch module, or a pipeline with `components`"),
    "prepare": (lambda self, setting: iter(()), "expected a dataset with __len__ and __getitem__"),
    "collate": (raising, "the dataset or collate raised KeyError: 'boom'"),
    "loss": (lambda self, batch: 1.0, "loss returned 1.0; expected a scalar tensor"),
    "evaluate": (lambda self: {"loss": torch.zeros(())}, "expected a dict of name -> number (of a tensor: .item())"),
    "samples": (lambda self: ["a cat"], "samples returned ['a cat']; expected a list of Sample"),
    "generate": (lambda self, sample, path: None, "generate has written no file at"),
    "exports": (lambda self: "kohya", "exports returned 'kohya'; expected a list of str"),
    "metadata": (lambda self: {"steps": 3}, "metadata returned {'steps': 3}; expected a dict of name -> text"),
    "finish": (lambda self, samples: None, "finish returned None; expected a dict of figures"),
    "extra_modules": (lambda self: [self.model.head], "expected a dict of file name -> torch module"),
}


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, answer: Any) -> str:
    monkeypatch.setattr(ToyTask, method, answer)
    with pytest.raises(errors.PluginError) as caught:
        train(toy_run(folder, steps=2, export=None if method == "exports" else ["native"]), silent=True)
    assert caught.value.plugin == "toy_tasks"
    assert "task 'toy-task'" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_task_returns_is_checked(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, reason = METHODS[method]
    assert reason in refused(tmp_path / "run", monkeypatch, method, answer)


class Grouped(list[Any]):
    groups = (0, 1)


def test_groups_are_one_for_each_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = refused(tmp_path / "run", monkeypatch, "prepare", lambda self, setting: Grouped([1, 2, 3]))
    assert "prepare returned 3 examples and `groups` of 2" in told


@pytest.mark.parametrize("method", ["load_model", "prepare", "loss", "evaluate", "generate", "finish", "extra_modules"])
def test_what_a_task_raises_names_it(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{method} raised KeyError: 'boom'" in refused(tmp_path / "run", monkeypatch, method, raising)


def test_what_it_raises_when_it_is_made_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "__init__ raised KeyError" in refused(tmp_path / "run", monkeypatch, "__init__", raising)


def test_errors_of_the_data_and_of_memory_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, batch: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ToyTask, "loss", full)
    with pytest.raises(torch.OutOfMemoryError):
        train(toy_run(tmp_path / "run"), silent=True)


_LOSS = ToyTask.loss
LOSSES: dict[str, tuple[Any, str]] = {
    "a vector": (lambda loss: loss.expand(2), "of shape [2] and dtype torch.float32; expected a scalar, such as"),
    "one in a list": (lambda loss: loss[None], "of shape [1] and dtype torch.float32; expected a scalar"),
    "a whole number": (lambda loss: loss.long(), "of shape [] and dtype torch.int64"),
    "detached": (lambda loss: loss.detach(), "returned a tensor without a gradient"),
    "nothing": (lambda loss: None, "returned None; expected a scalar tensor"),
}


@pytest.mark.parametrize("what", LOSSES)
def test_the_loss_is_checked(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = LOSSES[what]
    assert reason in refused(tmp_path / "run", monkeypatch, "loss", lambda self, batch: change(_LOSS(self, batch)))


@pytest.mark.parametrize("name", ["adapter", "optimizer", "state", "a/b", "", "../head", 3])
def test_names_of_further_files_are_checked(name: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = refused(tmp_path / "run", monkeypatch, "extra_modules", lambda self: {name: self.model.head})
    assert f"extra_modules names a file {name!r}" in reason


class NoOptions(ToyTask):
    Options: ClassVar[Any] = dict


class OneSuffix(ToyTask):
    suffixes = ".txt"


no_task = ToyTask.loss
DECLARED = {
    "NoOptions": "Options is <class 'dict'>; expected a subclass of Section",
    "OneSuffix": "suffixes is '.txt'; expected endings such as ('.txt',)",
    "no_task": "expected a subclass of adapterkit.training.task.Task",
    "Nothing": "has no attribute 'Nothing'",
}


@ak.hookimpl
def adapterkit_register_tasks() -> list[TaskSpec]:
    return [TaskSpec(f"strange-{name.lower().replace('_', '-')}", f"{__name__}:{name}") for name in DECLARED]


@pytest.mark.parametrize("name", DECLARED)
def test_what_a_task_declares_is_checked(name: str) -> None:
    manager = ak.get_plugin_manager()
    manager.register(sys.modules[__name__], name="strangers")
    try:
        task = f"strange-{name.lower().replace('_', '-')}"
        with pytest.raises(errors.ConfigError) as caught:
            load_run(None, [f"task={task}", "model=toy", "data=toy", "output=out", "adapter={type: lora}"])
    finally:
        manager.unregister(name="strangers")
    [problem] = caught.value.problems
    assert problem.startswith("task: plug-in 'strangers': ")
    assert DECLARED[name] in problem


class TestFurtherModules:
    """What is trained beside the adapter is the base's alone, also where the adapter acts in it."""

    @staticmethod
    def further(self: Any) -> Mapping[str, nn.Module]:
        return {"block": self.model.blocks[0]}

    def test_their_file_holds_nothing_of_the_adapter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ToyTask, "extra_modules", self.further)
        train(toy_run(tmp_path / "run"), silent=True)
        block = toys.ToyModel(seed=3).blocks[0]
        for file in (tmp_path / "run/block.safetensors", tmp_path / "run/checkpoints/step-000008/block.safetensors"):
            assert load_file(file).keys() == block.state_dict().keys()
        assert any(not torch.equal(t, block.state_dict()[key]) for key, t in load_file(file).items())

    def test_a_resumed_run_is_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ToyTask, "extra_modules", self.further)
        train(toy_run(tmp_path / "whole", scheduler="constant"), silent=True)
        train(toy_run(tmp_path / "parts", scheduler="constant", steps=4), silent=True)
        train(toy_run(tmp_path / "parts", scheduler="constant"), resume=True, silent=True)
        for name in ("adapter", "block"):
            whole, parts = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "parts"))
            assert whole.keys() == parts.keys()
            assert all(torch.equal(parts[key], tensor) for key, tensor in whole.items())

    def test_every_parameter_is_trained_once(self) -> None:
        toys.register()
        model = toys.ToyModel()
        adapters = ak.Adapters(model)
        adapters.add("a", ak.LoRA(rank=2, targets="attn.*"))
        adapters.freeze("a")
        mine = [Trainable(str(i), p, 2.0, 0.1) for i, p in enumerate(adapters.parameters("a"))]
        base = [Trainable(name, p, 1.0, 0.0) for name, p in own_parameters(model.blocks[0])]
        trained = Trained([*mine, *base], {"block": model.blocks[0]})
        assert trained.rates == [2.0, 1.0]
        adapter, block = trained.groups()
        assert (adapter["lr"], adapter["weight_decay"], block["lr"], block["weight_decay"]) == (2.0, 0.1, 1.0, 0.0)
        assert {id(p) for p in adapter["params"]} == {id(p) for p in adapters.parameters("a")}
        own = [*adapter["params"], *block["params"]]
        assert len({id(parameter) for parameter in own}) == len(own)
        assert not any(parameter.requires_grad for parameter in adapter["params"])
        assert all(parameter.requires_grad for parameter in block["params"])

    def test_they_are_read_with_or_without_the_adapter(self, tmp_path: Path) -> None:
        toys.register()
        model, other = toys.ToyModel(), toys.ToyModel(seed=1)
        adapters = ak.Adapters(model)
        adapters.add("a", ak.LoRA(rank=2, targets="attn.*"))
        before = {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}
        save_modules({"block": other.blocks[0]}, tmp_path)
        load_modules({"block": model.blocks[0]}, tmp_path)
        assert all(torch.equal(t, before[key]) for key, t in adapters.state_dict("a").items())
        adapters.detach()
        mine, theirs = model.blocks[0].state_dict(), other.blocks[0].state_dict()
        assert all(torch.equal(mine[key], tensor) for key, tensor in theirs.items())
        save_file({"up.weight": torch.zeros(1)}, tmp_path / "block.safetensors")
        with pytest.raises(errors.CheckpointError, match="Missing key"):
            load_modules({"block": model.blocks[0]}, tmp_path)


class TestGroups:
    def test_batches_are_of_one_group_and_a_resumed_run_is_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = Sequences.__getitem__

        def cut(data: Any, draw: Any) -> dict[str, Any]:
            return {"tokens": own(data, draw)["tokens"][: 3 + data.groups[draw.index]]}  # lengths that no batch joins

        monkeypatch.setattr(Sequences, "groups", [0, 1, 0, 1, 1, 0, 0], raising=False)
        monkeypatch.setattr(Sequences, "__getitem__", cut)
        train(toy_run(tmp_path / "whole", scheduler="constant"), silent=True)
        train(toy_run(tmp_path / "parts", scheduler="constant", steps=4), silent=True)
        train(toy_run(tmp_path / "parts", scheduler="constant"), resume=True, silent=True)
        one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one)
