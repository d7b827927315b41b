"""Modules that wait for a file's tensors: points that are alike share the building, and nothing else."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.handle.building import skeletons_of
from adapterkit.points import InjectionPoint
from adapterkit.testing import toys


@pytest.fixture
def adapters() -> ak.Adapters:
    toys.register()
    return ak.Adapters(toys.ToyModel(layers=3))


def builds(monkeypatch: pytest.MonkeyPatch, cls: type) -> list[str]:
    """The ids of the points for which a config builds."""
    found: list[str] = []
    build = cls.build

    def counting(self: Any, point: InjectionPoint) -> Any:
        found.append(point.id)
        return build(self, point)

    monkeypatch.setattr(cls, "build", counting)
    return found


def test_alike_points_are_built_once_and_share_nothing(
    adapters: ak.Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters.add("a", ak.LoRA(rank=2, targets="attn.{q,v} mlp.up", ranks={"attn.q@layer=2": 1}, dropout=0.5))
    for number, parameter in enumerate(adapters.parameters("a")):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    path = adapters.save("a", tmp_path / "a")
    found = builds(monkeypatch, ak.LoRA)
    adapters.load(path, "b")
    # q, v and q of rank 1 differ in their spans and ranks; mlp.up in its shape.
    assert found == ["attn.q@toy.0", "attn.v@toy.0", "mlp.up@toy.0", "attn.q@toy.2"]
    modules: dict[str, Any] = adapters.modules("b")
    assert [module.at for module in modules.values()] == list(modules)
    tensors = [tensor for module in modules.values() for tensor in module.parameters()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    every = [inner for module in modules.values() for inner in module.modules()]
    assert len({id(inner) for inner in every}) == len(every)
    containers = [value for inner in every for value in inner.__dict__.values() if isinstance(value, (dict, list, set))]
    assert len({id(value) for value in containers}) == len(containers)
    for key, tensor in adapters.state_dict("b").items():
        assert torch.equal(tensor, adapters.state_dict("a")[key])


ALIKE: dict[str, tuple[ak.AdapterConfig, dict[str, Any]]] = {
    "prefix": (ak.Prefix(length=2), {"length": 3}),
    "prefix of a network": (ak.Prefix(length=2, reparam=3), {"reparam": 4}),
    "reft": (ak.ReFT(rank=2, prefix=1, suffix=1), {"tied": False}),
}


@pytest.mark.parametrize("name", ALIKE)
def test_types_of_the_kit_say_what_is_alike(name: str, adapters: ak.Adapters, tmp_path: Path) -> None:
    config, other = ALIKE[name]
    first, *rest = [point.id for point in adapters.points() if config.means(point)]
    adapters.add("a", config, settings={first: other, **{key: {} for key in rest}})
    for number, parameter in enumerate(adapters.parameters("a")):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    built: list[str] = []
    path, build = adapters.save("a", tmp_path / "a"), type(config).build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config), "build", lambda self, p: (built.append(p.id), build(self, p))[1])
        adapters.load(path, "b")
    assert built == [first, *rest[:1]]
    for key, tensor in adapters.state_dict("b").items():
        assert torch.equal(tensor, adapters.state_dict("a")[key])


def test_what_is_loaded_is_as_what_is_built(adapters: ak.Adapters, tmp_path: Path) -> None:
    """In every attribute but its tensors."""
    adapters.add("a", ak.LoRA(rank=2, targets="attn.{q,v} conv", dropout=0.5, rank_dropout=0.1))
    adapters.load(adapters.save("a", tmp_path / "a"), "b")
    for key, built in adapters.modules("a").items():
        loaded = adapters.modules("b")[key]
        assert type(loaded) is type(built)
        assert repr(loaded) == repr(built)
        assert loaded.training is built.training
        own = ("_parameters", "_modules", "_buffers", "_diffusers_hook")
        each = ({k: v for k, v in one.__dict__.items() if k not in own} for one in (loaded, built))
        mine, theirs = ({k: comparable(v) for k, v in attributes.items()} for attributes in each)
        assert mine == theirs
        copy.deepcopy(loaded)
    assert not any(parameter.requires_grad for parameter in adapters.parameters("b"))


def comparable(value: Any) -> Any:
    return (value.func, value.args, value.keywords) if isinstance(value, functools.partial) else value


@dataclass(frozen=True)
class Bound(ak.LoRA):
    """Its modules keep a method of their own, which a copy must not take over."""

    def build(self, point: InjectionPoint) -> ak.AdapterModule:
        module: Any = super().build(point)
        module.show = module.extra_repr
        return module

    def alike(self, point: InjectionPoint) -> tuple[Hashable, ...]:
        return super().alike(point)


def test_modules_that_keep_their_own_methods_are_built_each(adapters: ak.Adapters) -> None:
    points = {point.id: point for point in adapters.points("attn.*")}
    skeletons = skeletons_of(Bound(rank=1))
    modules: list[Any] = [skeletons.at(points[f"attn.q@toy.{layer}"], False)[0] for layer in range(2)]
    assert [module.show.__self__ is module for module in modules] == [True, True]


@dataclass(frozen=True)
class ByRole(ak.LoRA):
    """Builds otherwise than its parent, which said what is alike for its own build."""

    def build(self, point: InjectionPoint) -> ak.AdapterModule:
        module = super().build(point)
        module.role = point.role  # type: ignore[assignment]
        return module


@dataclass(frozen=True)
class Told(ByRole):
    def alike(self, point: InjectionPoint) -> tuple[Hashable, ...]:
        return (*super().alike(point), point.role)


def test_alike_is_not_taken_over_by_a_subclass_that_builds_otherwise(adapters: ak.Adapters) -> None:
    points = {point.id: point for point in adapters.points("attn.*")}
    for cls, shared in ((ByRole, False), (Told, True), (ak.LoRA, True)):
        skeletons = skeletons_of(cls(rank=1))
        modules: list[Any] = [skeletons.at(points[f"attn.q@toy.{layer}"], False) for layer in range(2)]
        assert (modules[0][1] is modules[1][1]) is shared
        assert modules[0][0] is not modules[1][0]


class Odd(nn.Linear):
    """Keeps its state in its own way."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] + 1
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True)
class Kept(ak.AdapterConfig):
    """Buffers of every kind below a child, and a type that loads in a way of its own."""

    kinds: ClassVar[frozenset[Any]] = frozenset({"weight"})
    targets: str = "mlp.up"
    odd: bool = False
    lacks: bool = False
    norm: bool = True

    def build(self, point: InjectionPoint) -> ak.AdapterModule:
        return KeptModule(self)

    def alike(self, point: InjectionPoint) -> Hashable:
        return ()


class KeptModule(ak.AdditiveModule):
    def __init__(self, config: Kept) -> None:
        super().__init__()
        self.inner = (Odd if config.odd else nn.Linear)(2, 2)
        self.norm = nn.BatchNorm1d(2) if config.norm else None
        self.inner.bias.requires_grad_(False)
        if config.lacks:
            self.register_buffer("steps", torch.arange(3.0), persistent=False)

    def delta(self, x: Tensor) -> Tensor:
        return 0 * x.sum() + 0 * self.inner.weight.sum()


CONFIGS = {
    "plain": Kept(),
    "odd": Kept(odd=True),
    "lacks": Kept(lacks=True),
    "lacks all": Kept(lacks=True, norm=False),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_buffers_children_and_own_ways_of_loading(adapters: ak.Adapters, config: Kept) -> None:
    from adapterkit.handle.fitting import Target
    from adapterkit.handle.loading import _load_one

    points = adapters.points("mlp.up")
    tensors = {key: torch.full_like(t, 3) for key, t in KeptModule(config).state_dict().items()}
    skeletons, target = skeletons_of(config), Target(adapters._mapped, None, [], finite=False)
    loaded: list[Any] = [_load_one(skeletons, p, tensors, target) for p in points]
    for module in loaded:
        state = module.state_dict()
        expected = {k: t + 1 if config.odd and k == "inner.weight" else t for k, t in tensors.items()}
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
        assert not config.norm or state["norm.num_batches_tracked"].dtype == torch.int64
        if config.lacks:
            assert module.steps.tolist() == [0, 1, 2]
    assert len({module.inner.weight.data_ptr() for module in loaded}) == len(loaded)
