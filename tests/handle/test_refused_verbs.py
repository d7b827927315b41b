"""What a verb refuses: the error, the value that is told, and a model that is what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.handle.stand_ins import replace_layer
from adapterkit.points import InjectionPoint, Kind
from adapterkit.testing import toys
from tests.values import randomize


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().eval()


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="attn.q"))
    randomize(adapters, "a")
    return adapters


VERBS: dict[str, tuple[Callable[[ak.Adapters], object], type[Exception], str]] = {
    "a step that is a flag": (lambda a: a.at_step(True), errors.ConfigError, r"at_step\(\).*int, not True"),
    "a step that is text": (lambda a: a.at_step("3"), errors.ConfigError, r"at_step\(\).*int, not '3'"),  # type: ignore[arg-type]
    "training nobody": (lambda a: a.train(), errors.ConfigError, r"train\(\).*name the adapters.*freeze\(\)"),
}


@pytest.mark.parametrize("name", VERBS)
def test_an_argument_is_told(name: str, model: toys.ToyModel, adapters: ak.Adapters) -> None:
    call, error, told = VERBS[name]
    before = model(toys.ids())
    training = [p.requires_grad for p in adapters.parameters("a")]
    with pytest.raises(error, match=told):
        call(adapters)
    assert torch.equal(model(toys.ids()), before)
    assert [p.requires_grad for p in adapters.parameters("a")] == training


@pytest.mark.parametrize("verb", ["merge", "bake"])
def test_where_nothing_acts_nothing_is_merged(verb: str, model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.activate(None)
    before = model(toys.ids())
    with pytest.raises(errors.StateError, match="nothing acts, so there is nothing to merge; name an adapter"):
        getattr(adapters, verb)()
    assert torch.equal(model(toys.ids()), before)
    assert [*adapters] == ["a"]


@dataclass(frozen=True)
class Returns(ak.AdapterConfig):
    """A type whose builders return what a test says."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    common: ClassVar[frozenset[str]] = frozenset({"module", "together"})
    module: str = "adapter"
    together: str = "none"

    def build(self, point: InjectionPoint) -> Any:
        return ak.AdapterModule() if self.module == "adapter" else self.module

    def shared(self, points: Sequence[InjectionPoint]) -> Any:
        return None if self.together == "none" else self.together


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (Returns("attn.q", module="text"), r"Returns: build\(attn.q@.*\) returned str, not an AdapterModule"),
        (Returns("attn.q", together="text"), r"Returns: shared\(points\) returned str, neither a module nor None"),
    ],
    ids=["build", "shared"],
)
def test_a_builder_that_returns_something_else(config: Returns, told: str, adapters: ak.Adapters) -> None:
    with pytest.raises(errors.ConfigError, match=told):
        adapters.add("b", config)
    assert [*adapters] == ["a"]


def parts() -> tuple[SimpleNamespace, list[ak.Adapters]]:
    """A pipeline of two models, each with an adapter and a handle of its own."""
    toys.register()
    pipe = SimpleNamespace(components={"one": toys.ToyModel().eval(), "two": toys.ToyModel().eval()})
    own = [ak.Adapters(SimpleNamespace(components={name: model})) for name, model in pipe.components.items()]
    for handle, name in zip(own, ("a", "b"), strict=True):
        handle.add(name, ak.LoRA(rank=2, targets="attn.q"))
        randomize(handle, name)
    return pipe, own


def outputs(pipe: SimpleNamespace) -> list[Tensor]:
    return [model(toys.ids()) for model in pipe.components.values()]


def test_parts_that_have_adapters_become_one() -> None:
    pipe, own = parts()
    before = outputs(pipe)
    together = ak.Adapters(pipe)
    assert {*together} == {"a", "b"}
    assert {*together.active} == {"a", "b"}
    assert all(map(torch.equal, outputs(pipe), before))
    together.activate("b")
    assert torch.equal(outputs(pipe)[1], before[1])
    assert not torch.equal(outputs(pipe)[0], before[0])
    assert {*own[0]} == {*own[1]} == {"a", "b"}
    together.detach()
    assert not any("adapterkit" in key for model in pipe.components.values() for key in model.state_dict())


def test_parts_with_one_name_are_told() -> None:
    pipe, own = parts()
    own[1].add("a", ak.LoRA(rank=1, targets="attn.q"))
    before = outputs(pipe)
    with pytest.raises(errors.AttachError, match=r"one and two have adapters .*'a' is in both; remove it"):
        ak.Adapters(pipe)
    assert all(map(torch.equal, outputs(pipe), before))
    own[1].remove("a")
    assert {*ak.Adapters(pipe)} == {"a", "b"}


def test_parts_in_the_middle_of_something_are_told() -> None:
    pipe, own = parts()
    with own[0].merged(), pytest.raises(errors.StateError, match=r"merged in a part of this pipeline; unmerge\(\)"):
        ak.Adapters(pipe)
    with (
        own[0].activated(None),
        own[1].activated(None),
        pytest.raises(errors.StateError, match="block that says what acts there; leave it first"),
    ):
        ak.Adapters(pipe)
    assert {*ak.Adapters(pipe)} == {"a", "b"}


def test_a_class_that_was_changed_is_not_baked(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    path = adapters.modules("a")
    point = next(point for point in adapters.points() if point.id in path)
    layer = model.get_submodule(point.path)
    layer.__class__ = type("Sharded", (nn.Linear,), {})
    with pytest.raises(errors.StateError, match=r"class of .* was changed after attaching"):
        adapters.bake("a")
    assert [*adapters] == ["a"]


def test_a_layer_without_adapters_is_not_replaced() -> None:
    with pytest.raises(errors.AttachError, match="Linear has no adapters"):
        replace_layer(nn.Linear(2, 2), "it", nn.Linear(2, 2))
