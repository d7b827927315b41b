"""Models inside a model: components whose points are those of the same model alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backend import Backend
from adapterkit.errors import PluginError, StateError
from adapterkit.mapping.family import Group, Weight, resolve
from adapterkit.mapping.model import map_model
from adapterkit.points import InjectionPoint
from adapterkit.specs import BackendSpec
from adapterkit.testing import toys
from adapterkit.testing.toys import ToyModel
from tests.backends import vision_checks as checks


class Pair(nn.Module):
    """Two toys, the second of which reads what the first says; its head is tied to the first one's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ToyModel(seed=1)
        self.bridge = nn.Sequential(nn.Linear(11, 11), nn.LayerNorm(11))
        self.inner = nn.ModuleDict({"second": ToyModel(layers=1, seed=2)})
        self.top = nn.Linear(8, 11, bias=False)
        self.top.weight = self.first.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        told = self.bridge(self.first(ids)).argmax(-1)
        second = self.inner["second"]
        return self.top(second.norm(second.blocks[0](second.embed(told)))) + self.bridge(self.first(ids)) + second(ids)


class PairBackend(Backend):
    component = "pair"
    told: Mapping[str, str] = {"first": "first", "second": "inner.second"}

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        entries = (Weight("proj.in", "bridge.0"), Weight("head", "top"), Weight("attn.o", "first.blocks.0.attn.proj"))
        return resolve(model, (Group("", "", entries),), component)

    def parts(self, model: nn.Module) -> Mapping[str, str]:
        return self.told


pair_backend = PairBackend


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    toys.register()
    manager = ak.get_plugin_manager()
    plugin: Any = ModuleType("pairs")
    specs = [BackendSpec("pair", f"{__name__}:pair_backend", models=("tests:Pair",))]
    plugin.adapterkit_register_backends = ak.hookimpl(lambda: specs, specname="adapterkit_register_backends")
    manager.register(plugin, name="pairs")
    yield
    manager.unregister(name="pairs")


def run(model: nn.Module) -> Tensor:
    return model(toys.ids())


def pair() -> Pair:
    torch.manual_seed(0)
    return Pair().eval().requires_grad_(False)


def adapted(model: Any, targets: str = "attention mlp.* proj.in", **options: Any) -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets=targets, **options))
    checks.randomise(adapters)
    return adapters


def test_points_of_a_part_are_those_of_the_model_alone() -> None:
    model = pair()
    points = ak.points(model)
    for name, path, part in (("first", "first", model.first), ("second", "inner.second", model.inner["second"])):
        alone = list(ak.points(part))
        inside = [point for point in points if point.component == name]
        assert sorted(point.id.replace(f"@{name}", "@toy") for point in inside) == sorted(p.id for p in alone)
        assert {point.tags["tower"] for point in inside} == {name}
        assert {point.model for point in inside} == {"pair"}
        there = {point.id: point for point in alone}
        for point in inside:
            own = there[point.id.replace(f"@{name}", "@toy")]
            assert point.path == ".".join(word for word in (path, own.path) if word)
            assert (point.shape, point.span, point.kind) == (own.shape, own.span, own.kind)
            module = model.get_submodule(point.path)
            assert module is part.get_submodule(own.path)


def test_what_is_beside_the_parts_is_the_models_own() -> None:
    """Its backend's point in a part is left out: the part's own backend maps that."""
    points = [point for point in ak.points(pair()) if point.component == "pair"]
    assert [point.id for point in points] == ["proj.in@pair", "head@pair", "norm@pair.bridge.1"]
    assert all("tower" not in point.tags and "model" not in point.tags for point in points)


def test_points_are_in_the_order_of_the_model() -> None:
    layers = [point.path for point in ak.points(pair(), "linear head embed.*")]
    order = [path for path, _ in pair().named_modules(remove_duplicate=False)]
    assert layers == sorted(layers, key=order.index)
    assert [path.partition(".")[0] for path in layers if "." not in path or path.endswith("bridge.0")]


def test_selectors_name_parts_towers_and_the_whole() -> None:
    model = pair()
    first = ak.points(model, "attention@component=first").ids
    assert first == ak.points(model, "attention@tower=first").ids
    both = ak.points(model, "attention@model=pair").ids
    assert both == ak.points(model, "attention").ids
    assert set(first) < set(both)
    assert ak.points(model, "path:pair.first.blocks.0.up").ids == ["mlp.up@first.0"]


def test_an_adapter_of_a_part_moves_to_the_model_alone_and_back(tmp_path: Path) -> None:
    model, other = pair(), pair()
    alone = other.inner["second"]
    adapted(model, "attention@component=second").save("a", tmp_path / "a.safetensors")
    PairBackend.told = {"first": "first", "toy": "inner.second"}
    try:
        same = adapted(pair(), "attention@component=toy")
        same.save("a", tmp_path / "a.safetensors")
        fresh = ak.Adapters(alone)
        fresh.load(tmp_path / "a.safetensors", "a")
        fresh.activate("a")
        tokens = toys.ids()
        expected = same._mapped.roots[0].inner["second"](tokens)
        assert torch.equal(alone(tokens), expected)
        fresh.save("a", tmp_path / "b.safetensors")
        again = ak.Adapters(pair())
        again.load(tmp_path / "b.safetensors", "a")
        for key, tensor in same.state_dict("a").items():
            assert torch.equal(again.state_dict("a")[key], tensor)
    finally:
        PairBackend.told = {"first": "first", "second": "inner.second"}


@pytest.mark.parametrize(
    "config",
    [ak.LoRA(rank=2, targets="all"), ak.Bottleneck(width=3, targets="all"), ak.Prefix(length=2, init_std=1.0)],
    ids=lambda config: type(config).__name__,
)
def test_adapters_in_all_parts_come_act_and_go(config: ak.AdapterConfig) -> None:
    checks.check_adapter(pair(), run, config)


def test_merged_baked_copied_and_saved(tmp_path: Path) -> None:
    model = pair()
    adapters = adapted(model)
    y = run(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied), y)
    adapters.merge("a")
    torch.testing.assert_close(run(model), y, atol=1e-5, rtol=1e-5)
    adapters.unmerge()
    assert torch.equal(run(model), y)
    adapters.save("a", tmp_path / "a.safetensors")
    twin = pair()
    fresh = ak.Adapters(twin)
    fresh.load(tmp_path / "a.safetensors", "a")
    fresh.activate("a")
    fresh.freeze()
    adapters.freeze()
    assert torch.equal(run(twin), run(model))
    fresh.bake("a")
    torch.testing.assert_close(run(twin), y, atol=1e-5, rtol=1e-5)
    assert twin.state_dict().keys() == pair().state_dict().keys()


def test_a_tie_across_parts_is_seen_when_it_is_baked() -> None:
    adapters = adapted(pair(), "embed.tokens@component=first")
    with pytest.raises(ak.errors.NotMergeableError, match=r"first.embed.weight and first.head.weight and top.weight"):
        adapters.bake("a")


def test_in_a_pipeline_parts_have_the_slots_name() -> None:
    pipe = SimpleNamespace(components={"text_encoder": pair(), "unet": ToyModel()})
    mapped = map_model(pipe)
    assert list(mapped.components) == ["text_encoder", "unet"]
    alone = {point.id for point in ak.points(pair()) if point.role not in ("norm",)}

    def inside(key: str) -> str:
        role, _, place = key.partition("@")
        tower, _, site = place.partition(".")
        word = "text_encoder" if tower == "pair" else f"text_encoder.{tower}"
        return f"{role}@{word}" + (f".{site}" if site else "")

    own = {point.id for point in mapped.points() if point.component == "text_encoder" and point.role != "norm"}
    assert own == {inside(key) for key in alone}
    assert "norm@text_encoder.first.blocks.0.norm1" in mapped.by_id()
    before = run(pipe.components["text_encoder"])
    adapters = adapted(pipe, "attention@tower=second")
    assert not torch.equal(run(pipe.components["text_encoder"]), before)
    adapters.detach()
    assert torch.equal(run(pipe.components["text_encoder"]), before)


def test_a_handle_on_a_pipeline_knows_the_parts_of_a_model_alone() -> None:
    model = pair()
    adapted(model)
    pipe = SimpleNamespace(components={"pair": model, "unet": ToyModel()}, pair=model)
    both = ak.Adapters(pipe)
    assert list(both) == ["a"]
    assert {"first", "second", "pair", "unet"} == {point.component for point in both.points()}
    both.remove("a")
    assert {"pair", "unet"} == {point.component for point in ak.Adapters(pipe).points()}


def test_roles_are_given_by_the_path_in_the_whole() -> None:
    points = ak.points(pair(), roles={"conv.own": "first.blocks.*.conv", "proj.own": "bridge.0"})
    assert [p.id for p in points if p.role.endswith(".own")] == [
        "conv.own@first.blocks.0.conv",
        "conv.own@first.blocks.1.conv",
        "proj.own@pair.bridge.0",
    ]


def test_two_parts_of_one_name_are_told_apart() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = pair(), pair()

    class AroundBackend(PairBackend):
        component = "around"
        told = {"first": "first", "second": "other"}

    components = map_model(Around(), backend=_register(AroundBackend)).components
    expected = ["first", "first_first", "first_second", "second", "second_first", "second_second"]
    assert list(components) == ["around", *expected]
    assert components["second_first"].module is components["around"].root.other.first


def test_the_model_inside_keeps_the_word_for_both() -> None:
    class PairAroundBackend(PairBackend):
        told = {"pair": "first"}

    components = map_model(nn.ModuleDict({"first": pair()}), backend=_register(PairAroundBackend)).components
    assert list(components) == ["model", "pair", "first", "second"]


def _register(cls: type[Backend]) -> str:
    globals()[cls.__name__] = cls
    plugin: Any = ModuleType(cls.__name__)
    specs = [BackendSpec("around", f"{__name__}:{cls.__name__}", models=("nowhere:Around",))]
    plugin.adapterkit_register_backends = ak.hookimpl(lambda: specs, specname="adapterkit_register_backends")
    manager = ak.get_plugin_manager()
    if manager.get_plugin("around") is not None:
        manager.unregister(name="around")
    manager.register(plugin, name="around")
    return "around"


@pytest.mark.parametrize(
    ("told", "match"),
    [
        (["first"], "expected a mapping"),
        ({"First": "first"}, "expected a word"),
        ({"first": "third"}, "no module"),
        ({"first": ""}, "no module"),
        ({"first": "first", "block": "first.blocks.0"}, "inside another part"),
    ],
)
def test_parts_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, told: Any, match: str) -> None:
    monkeypatch.setattr(PairBackend, "told", told)
    with pytest.raises(PluginError, match=match):
        ak.points(pair())


def test_what_a_parts_backend_refuses_is_refused_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toys.ToyBackend, "refuses", {"fuse": "it would put other layers in their place"})
    monkeypatch.setattr(ToyModel, "fuse", lambda self: None, raising=False)
    model = pair()
    adapters = adapted(model, "proj.in")
    with pytest.raises(StateError, match="other layers"):
        model.inner["second"].fuse()
    adapters.detach()
    model.inner["second"].fuse()
