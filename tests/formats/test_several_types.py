"""An adapter of several types at points of their own acts, merges, trains, is saved and is removed as one."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit import errors
from adapterkit.checkpoint import Checkpoint
from adapterkit.formats.source import Source
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids()
CONFIGS: dict[str, ak.AdapterConfig] = {
    "lora": ak.LoRA(rank=2, targets="attn.{q,v} conv", plus=16.0),
    "norms": ak.Trainable("norm"),
    "neck": ak.Bottleneck(width=3),
    "kv": ak.Prefix(length=2),
}


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval().requires_grad_(False)


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    """Each type under a name of its own."""
    adapters = ak.Adapters(model)
    for number, (name, config) in enumerate(CONFIGS.items()):
        adapters.add(name, config)
        randomize(adapters, name, number)
    adapters.freeze()
    return adapters


def together(adapters: ak.Adapters, *names: str) -> Checkpoint:
    """Adapters as the parts of one."""
    each = [adapters.checkpoint(name) for name in names or CONFIGS]
    return each[0].replace(parts=[one.part for one in each], metadata={"trigger": "ink"})


@pytest.fixture
def mixed(adapters: ak.Adapters) -> ak.Adapters:
    """All types as `mixed`, and none beside it."""
    checkpoint = together(adapters)
    adapters.detach()
    adapters.install("mixed", checkpoint)
    return adapters


def test_it_acts_as_its_types_do_together(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    report = adapters.install("mixed", together(adapters))
    assert (report.type, report.metadata) == ("lora + trainable + bottleneck + prefix", {"trigger": "ink"})
    assert set(report.points) == {key for name in CONFIGS for key in adapters.modules(name)}
    with adapters.activated(list(CONFIGS)):
        y = model(X)
    with adapters.activated("mixed"):
        assert torch.equal(model(X), y)
    with adapters.activated({"mixed": 0.5}):
        half = model(X)
    with adapters.activated(dict.fromkeys(CONFIGS, 0.5)):
        assert torch.equal(model(X), half)
    assert sum(p.numel() for p in adapters.parameters("mixed")) == sum(p.numel() for p in adapters.parameters(*CONFIGS))


def test_it_is_routed_as_one(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.install("mixed", together(adapters, "lora", "neck"))
    routes = ["mixed", None, "lora"]
    with adapters.routed(routes):
        routed = model(X)
    for row, route in enumerate(routes):
        with adapters.activated(route):
            assert torch.allclose(routed[row], model(X)[row], rtol=0, atol=1e-12)


def test_what_it_was_asked_for(mixed: ak.Adapters) -> None:
    assert mixed.configs("mixed") == list(CONFIGS.values())
    with pytest.raises(errors.StateError, match=r"several types \(LoRA, Trainable, Bottleneck, Prefix\).*configs"):
        mixed.config("mixed")
    assert "mixed (lora + trainable + bottleneck + prefix" in str(mixed.report())


def test_it_merges_as_one(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.install("mixed", together(adapters, "lora", "norms"))
    adapters.activate("mixed")
    weight = adapters.points("attn.q")[0].path + ".weight"
    y, before = model(X), model.get_parameter(weight).clone()
    with adapters.merged():
        assert torch.allclose(model(X), y, rtol=0, atol=1e-10)
    assert torch.equal(model.get_parameter(weight), before)
    assert torch.equal(model(X), y)


def test_it_is_saved_and_loaded_bit_for_bit(model: toys.ToyModel, mixed: ak.Adapters, tmp_path: Path) -> None:
    with mixed.activated("mixed"):
        y = model(X)
    state = {key: tensor.clone() for key, tensor in mixed.state_dict("mixed").items()}
    path = mixed.save("mixed", tmp_path / "mixed.safetensors")
    header = json.loads(Source.of(path).metadata["adapterkit"])
    assert header["file_version"] == 3
    assert [part["type"] for part in header["adapters"][""]["parts"]] == ["lora", "trainable", "bottleneck", "prefix"]
    mixed.detach()
    report = mixed.load(path)
    assert (report.name, report.metadata, report.notes) == ("mixed", {"trigger": "ink"}, [])
    assert mixed.configs("mixed") == list(CONFIGS.values())
    assert mixed.state_dict("mixed").keys() == state.keys()
    assert all(torch.equal(mixed.state_dict("mixed")[key], tensor) for key, tensor in state.items())
    with mixed.activated("mixed"):
        assert torch.equal(model(X), y)
    assert mixed.save("mixed", tmp_path / "again").read_bytes() == path.read_bytes()


def test_it_goes_into_a_file_with_others(mixed: ak.Adapters, tmp_path: Path) -> None:
    mixed.add("plain", ak.LoRA(rank=1, targets="attn.q"))
    path = mixed.save(["mixed", "plain"], tmp_path / "two")
    mixed.detach()
    assert {name: report.type for name, report in mixed.load_all(path).items()} == {
        "mixed": "lora + trainable + bottleneck + prefix",
        "plain": "lora",
    }


def test_it_trains_as_its_types_ask(model: toys.ToyModel, mixed: ak.Adapters) -> None:
    mixed.train("mixed")
    groups = mixed.parameter_groups("mixed", lr=1.0)
    assert {group["lr"] for group in groups} == {1.0, 16.0}
    assert sum(len(group["params"]) for group in groups) == len(list(mixed.parameters("mixed")))
    mixed.activate("mixed")
    model(X).square().mean().backward()
    assert all(parameter.grad is not None for parameter in mixed.parameters("mixed"))


@dataclasses.dataclass(frozen=True)
class Told(ak.LoRA):
    """Keeps what it is told of its modules."""

    told: dict[str, list[str]] = dataclasses.field(default_factory=dict, compare=False)

    def after_step(self, modules: Mapping[str, ak.AdapterModule], step: int, steps: int) -> None:
        self.told["step"] = list(modules)

    def observed(self, modules: Mapping[str, ak.AdapterModule], base: Any) -> None:
        self.told["observed"] = list(modules)


def test_each_type_hears_of_its_own_modules(model: toys.ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = ak.Adapters(model)
    for name, targets in (("q", "attn.q"), ("v", "attn.v")):
        adapters.add(name, ak.LoRA(rank=1, targets=targets))
    checkpoint = together(adapters, "q", "v")
    adapters.detach()
    monkeypatch.setattr(type(ak.get_plugin_manager().adapter("lora")), "load", lambda self: Told)
    adapters.install("mixed", checkpoint)
    adapters.train("mixed")
    adapters.after_step(1, 1)
    with adapters.observing("mixed"):
        model(X)
    for config, role in zip(adapters.configs("mixed"), ("attn.q", "attn.v"), strict=True):
        assert isinstance(config, Told)
        for heard in ("step", "observed"):
            assert {key.partition("@")[0] for key in config.told[heard]} == {role}


def test_it_is_copied_and_removed_as_one(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    checkpoint = together(adapters)
    adapters.detach()
    before, classes = dict(model.state_dict()), [type(module) for module in model.modules()]
    adapters.install("mixed", checkpoint)
    adapters.activate("mixed")
    y = model(X)
    other = copy.deepcopy(model)
    assert torch.equal(other(X), y)
    adapters.remove("mixed")
    assert [type(module) for module in model.modules()] == classes
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(other(X), y)


def test_what_types_share_is_each_type_s_own(model: toys.ToyModel, tmp_path: Path) -> None:
    vera = pytest.importorskip("adapterkit_vera.vera", reason="the plug-in that shares is not here")
    adapters = ak.Adapters(model)
    for number, (name, targets) in enumerate({"q": "attn.q", "up": "mlp.up"}.items()):
        adapters.add(name, vera.VeRA(rank=2, targets=targets), seed=number)
        randomize(adapters, name, number)
    with adapters.activated(["q", "up"]):
        y = model(X)
    checkpoint = together(adapters, "q", "up")
    adapters.detach()
    adapters.install("mixed", checkpoint)
    shared = {key.partition("/")[0] for key in adapters.state_dict("mixed") if "@" not in key}
    assert shared == {"shared", "shared.1"}
    path = adapters.save("mixed", tmp_path / "x")
    adapters.detach()
    adapters.load(path, "mixed")
    with adapters.activated("mixed"):
        assert torch.equal(model(X), y)


def test_two_types_at_a_point_are_refused(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("more", ak.LoRA(rank=1, targets="attn.q"))
    checkpoint, names = together(adapters, "lora", "more"), list(adapters)
    with pytest.raises(errors.InvalidHeaderError, match=r"LoRA and LoRA; several types at a point are a Union"):
        adapters.install("mixed", checkpoint, source="mixed.safetensors")
    assert list(adapters) == names


def test_one_bad_part_leaves_the_model_as_it_was(adapters: ak.Adapters) -> None:
    checkpoint = together(adapters, "lora", "neck")
    adapters.detach()

    def broken(**changes: object) -> Checkpoint:
        return checkpoint.replace(parts=[checkpoint.parts[0], dataclasses.replace(checkpoint.parts[1], **changes)])

    tensors: Mapping[str, Mapping[str, Tensor]] = {key: {} for key in checkpoint.parts[1].tensors}
    for changes, error in (
        ({"type": "nope"}, errors.UnknownAdapterTypeError),
        ({"config": {"width": 0}}, errors.InvalidHeaderError),
        ({"tensors": tensors}, errors.MissingKeysError),
    ):
        with pytest.raises(error):
            adapters.install("mixed", broken(**changes))
        assert not len(adapters)


def test_who_can_handle_one_type_refuses_several(adapters: ak.Adapters) -> None:
    checkpoint = together(adapters, "lora", "neck")
    for ask in ("part", "type", "config", "tensors", "settings"):
        with pytest.raises(errors.CheckpointError, match="lora, bottleneck; native holds any"):
            getattr(checkpoint, ask)
    with pytest.raises(errors.CheckpointError):
        checkpoint.replace(type="lora")
    assert checkpoint.replace(metadata={}).parts is checkpoint.parts
