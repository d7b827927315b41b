"""Types that write `merged` or `delta_weight` alone, or neither; their forms of layers; and what they must not give."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.specs import AdapterSpec
from adapterkit.testing import AdapterConformance, toys
from tests.values import randomize

X = toys.ids()


class Factored(ak.AdapterModule):
    """Every weight has a factor, 1 + u v; v starts at zero."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(point.shape[0], 1))
        self.v = nn.Parameter(torch.zeros(1, math.prod(point.shape[1:])))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        u, v = self.u.to(weight.dtype), self.v.to(weight.dtype)
        return weight * (1 + (u @ v).view_as(weight)), bias


@dataclass(frozen=True)
class Factors(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "attention"

    def build(self, point: ak.InjectionPoint) -> Factored:
        return Factored(point)


class Update(ak.AdditiveModule):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.update = nn.Parameter(torch.zeros(point.shape))

    def delta_weight(self) -> Tensor:
        return self.update


@dataclass(frozen=True)
class Updated(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    forms = frozenset({"linear", "linear_t"})
    targets: str = "attention"

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        return Update(point)


class Bent(ak.AdditiveModule):
    """A gain of a bent projection: no weight does the same."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.project = nn.Parameter(torch.randn(point.in_features) / 4)
        self.gain = nn.Parameter(torch.zeros(point.out_features))

    def delta(self, x: Tensor) -> Tensor:
        return (x @ self.project.to(x.dtype)).tanh()[..., None] * self.gain.to(x.dtype)


@dataclass(frozen=True)
class Bending(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    forms = frozenset({"linear", "linear_t"})
    targets: str = "all"

    def build(self, point: ak.InjectionPoint) -> Bent:
        return Bent(point)


class Registering:
    @ak.hookimpl
    def adapterkit_register_adapters(self) -> list[AdapterSpec]:
        types = (Factors, Updated, Bending)
        return [
            AdapterSpec(one.__name__.lower(), f"{__name__}:{one.__name__}", kinds={"weight"}, summary="for tests")
            for one in types
        ]


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    manager = ak.get_plugin_manager()
    plugin = Registering()
    manager.register(plugin, name="merged-alone")
    yield
    manager.unregister(name="merged-alone")


class TestFactors(AdapterConformance):
    config = Factors()


class TestUpdated(AdapterConformance):
    config = Updated()


class TestBending(AdapterConformance):
    """The kit leaves out where a model reads weights, as a user has to."""

    config = Bending()


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


@pytest.mark.parametrize("targets", ["attn.q", "mlp.up", "conv", "embed.tokens", "attn.o mlp.down"])
def test_it_computes_with_its_weight(model: toys.ToyModel, targets: str) -> None:
    """At parts of fused layers, layers, grouped convolutions and embeddings; beside others, and around them."""
    adapters = ak.Adapters(model)
    adapters.add("mine", Factors(targets=targets))
    adapters.add("lora", ak.LoRA(rank=2, targets=targets))
    base = model(X)
    for i, name in enumerate(("mine", "lora")):
        randomize(adapters, name, i)
    for choice in ("mine", {"mine": -0.5}, ["mine", "lora"], ak.Stack("lora", "mine")):
        adapters.activate(choice)  # type: ignore[arg-type]
        y = model(X)
        assert not torch.allclose(y, base)
        with adapters.merged():
            assert torch.allclose(model(X), y, rtol=1e-9, atol=1e-9)


def test_it_computes_with_a_part_of_the_input() -> None:
    diffusion = pytest.importorskip("tests.backends.diffusion_models")
    model = diffusion.flux().double().eval()
    [point, *_] = [point for point in ak.points(model) if point.in_span is not None]
    base = diffusion.run(model)
    adapters = ak.Adapters(model)
    adapters.add("mine", Factors(targets=f"path:{point.path}"))
    randomize(adapters, "mine")
    y = diffusion.run(model)
    assert not torch.allclose(y, base)
    with adapters.merged():
        assert torch.allclose(diffusion.run(model), y, rtol=1e-9, atol=1e-9)


def test_forms_are_checked_before_anything_changes(model: toys.ToyModel) -> None:
    before = copy.deepcopy(model.state_dict())
    adapters = ak.Adapters(model)
    with pytest.raises(errors.IncompatibleTargetError, match="layers of the form linear/linear_t, and this is conv"):
        adapters.add("mine", Updated(targets="conv"))
    with pytest.raises(errors.IncompatibleTargetError, match="and this is embedding"):
        adapters.add("mine", Updated(targets="embed.tokens"))
    assert len(adapters) == 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


class Wrong(ak.AdditiveModule):
    def __init__(self, make: Callable[[Wrong], Tensor] | None, given: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.given = make, given
        self.one = nn.Parameter(torch.ones(1))

    def delta(self, x: Tensor) -> Tensor:
        return self.given(x)

    def delta_weight(self) -> Tensor:
        return self.one if self.make is None else self.make(self)


class Plain(ak.AdapterModule):
    pass


class Combining(ak.AdapterModule):
    def combine(self, x: Tensor, base: Any, parts: Any) -> Tensor:
        return base(x)


class Complex(ak.AdapterModule):
    def __init__(self, buffer: bool) -> None:
        super().__init__()
        tensor = torch.zeros(2, dtype=torch.complex64)
        if buffer:
            self.register_buffer("turn", tensor, persistent=False)
        else:
            self.turn = nn.Parameter(tensor)


@dataclass(frozen=True)
class Built(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "attn.o"
    make: ClassVar[Callable[[], ak.AdapterModule]]

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        return type(self).make()


def built(make: Callable[[], ak.AdapterModule]) -> ak.AdapterConfig:
    return type("Built", (Built,), {"make": staticmethod(make)})()


@pytest.mark.parametrize(
    ("given", "shape"), [(lambda x: x[..., :3], r"\(3, 5, 3\)"), (lambda x: x.new_ones(1), r"\(1,\)")]
)
def test_what_is_added_has_the_shape_of_the_output(model: toys.ToyModel, given: Any, shape: str) -> None:
    adapters = ak.Adapters(model)
    adapters.add("wrong", built(lambda: Wrong(None, given)))
    for choice in ("wrong", {"wrong": 0.5}, ak.Parallel("wrong", "wrong")):
        adapters.activate(choice)  # type: ignore[arg-type]
        with pytest.raises(
            errors.PluginError, match=rf"Wrong.delta at attn.o@toy.0 gave {shape}, and the base \(3, 5, 8\)"
        ):
            model(X)


def test_a_weight_has_the_shape_that_it_stands_for(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("wrong", built(lambda: Wrong(lambda module: module.one.expand(8, 1), torch.zeros_like)))
    before = model(X)
    with pytest.raises(
        errors.PluginError, match=r"Wrong.delta_weight at attn.o@toy.0 gave \(8, 1\), and the weight is"
    ):
        adapters.merge()
    assert torch.equal(model(X), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Plain, "Plain at attn.o@toy.0 defines no forward"),
        (Combining, "Combining at attn.o@toy.0 names no parts to combine"),
    ],
)
def test_what_does_not_act_says_so(model: toys.ToyModel, make: Any, message: str) -> None:
    ak.Adapters(model).add("wrong", built(make))
    with pytest.raises(NotImplementedError, match=message):
        model(X)


@pytest.mark.parametrize("buffer", [True, False])
def test_complex_numbers_are_refused(model: toys.ToyModel, buffer: bool) -> None:
    adapters = ak.Adapters(model)
    with pytest.raises(errors.ConfigError, match=r"Complex.turn is complex.*view_as_real"):
        adapters.add("wrong", built(lambda: Complex(buffer)))
    assert len(adapters) == 0
