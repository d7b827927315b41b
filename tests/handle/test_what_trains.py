"""Rates by parameter and point; parameters that their type holds."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.handle.building import Built
from adapterkit.handle.training import trained_parameters
from adapterkit.specs import AdapterSpec
from adapterkit.testing import toys

X = toys.ids()


class Common(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.ones(features))
        self.frame = nn.Parameter(torch.ones(features), requires_grad=False)


class HeldModule(ak.AdditiveModule):
    """`y + (frame + common frame) * (gain + common row)`: the frames are the type's own, and do not train."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(features))
        self.frame = nn.Parameter(torch.randn(features), requires_grad=False)

    def delta(self, x: Tensor) -> Tensor:
        value = (self.frame + self.shared.frame) * self.gain * self.shared.row
        return value.to(x.dtype).expand(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Held(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "attn.{q,v}"

    def build(self, point: ak.InjectionPoint) -> HeldModule:
        return HeldModule(point.out_features)

    def shared(self, points: Sequence[ak.InjectionPoint]) -> nn.Module:
        return Common(points[0].out_features)

    def rate(self, parameter: str, point: ak.InjectionPoint) -> float:
        return {"gain": 2.0, "shared.row": 3.0}[parameter] * (1 + int(point.tags["layer"]))


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    @ak.hookimpl
    def adapterkit_register_adapters() -> list[AdapterSpec]:
        return [AdapterSpec("held", f"{__name__}:Held", kinds={"weight"}, summary="holds")]

    plugin = type("Plugin", (), {"adapterkit_register_adapters": staticmethod(adapterkit_register_adapters)})()
    ak.get_plugin_manager().register(plugin, name="held")
    yield
    ak.get_plugin_manager().unregister(name="held")


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> ak.Adapters:
    toys.register()
    monkeypatch.setattr(ak.get_plugin_manager().adapter("held").__class__, "load", _load(AdapterSpec.load))
    made = ak.Adapters(toys.ToyModel().double())
    made.add("a", Held())
    return made


def _load(own: Callable[[AdapterSpec], type]) -> Callable[[AdapterSpec], type]:
    return lambda spec: Held if spec.name == "held" else own(spec)


def trains(adapters: ak.Adapters, name: str = "a") -> set[str]:
    return {
        f"{key}/{part}"
        for key, module in adapters.modules(name).items()
        for part, parameter in module.named_parameters()
        if parameter.requires_grad
    }


WANTED = {f"attn.{role}@toy.{layer}/gain" for role in "qv" for layer in (0, 1)} | {"attn.q@toy.0/shared.row"}


def test_what_a_type_holds_never_trains(adapters: ak.Adapters, tmp_path: Path) -> None:
    assert trains(adapters) == WANTED
    frames = {key: t.clone() for key, t in adapters.state_dict("a").items() if key.endswith("frame")}
    assert len(frames) == 5
    adapters.freeze("a")
    assert trains(adapters) == set()
    adapters.train("a")
    assert trains(adapters) == WANTED
    path = adapters.save("a", tmp_path / "a.safetensors")
    adapters.load(path, "b")
    assert trains(adapters, "b") == set()
    assert all(torch.equal(adapters.state_dict("b")[key], frame) for key, frame in frames.items())
    adapters.train("b")
    assert trains(adapters, "b") == WANTED
    assert trains(adapters) == set()
    assert {one.name: one.trainable for one in adapters.report().adapters} == {"a": False, "b": True}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_hold_it_too(adapters: ak.Adapters, copied: Callable[[nn.Module], nn.Module]) -> None:
    other = ak.Adapters(copied(next(iter(adapters._mapped.components.values())).root))
    assert trains(other) == WANTED
    other.freeze("a")
    other.train("a")
    assert trains(other) == WANTED


def test_an_optimizer_gets_what_trains_at_its_rate(adapters: ak.Adapters) -> None:
    groups = {group["lr"]: group["params"] for group in adapters.parameter_groups("a", lr=0.5)}
    modules = adapters.modules("a")
    assert {lr: {id(p) for p in found} for lr, found in groups.items()} == {
        1.0: {id(modules[f"attn.{role}@toy.0"].gain) for role in "qv"},
        2.0: {id(modules[f"attn.{role}@toy.1"].gain) for role in "qv"},
        1.5: {id(modules["attn.q@toy.0"].shared.row)},  # once, at the first point
    }
    part = Built(Held(), list(adapters.points("attn.{q,v}")), modules)
    named = {name: rate for name, _, rate in trained_parameters(part)}
    assert named == {
        "attn.q@toy.0/gain": 2.0, "attn.v@toy.0/gain": 2.0, "attn.q@toy.1/gain": 4.0, "attn.v@toy.1/gain": 4.0,
        "attn.q@toy.0/shared.row": 3.0,
    }  # fmt: skip


def test_a_unions_rates_are_its_parts(adapters: ak.Adapters) -> None:
    adapters.add("u", ak.Union((Held(), ak.LoRA(targets="mlp.up", plus=4))))
    groups = {group["lr"]: len(group["params"]) for group in adapters.parameter_groups("u", lr=1.0)}
    assert groups == {2.0: 2, 4.0: 4, 3.0: 1, 1.0: 2}  # gains of layer 0; of layer 1 and B; the row; A
    assert not any(name.endswith("frame") for name in trains(adapters, "u"))
