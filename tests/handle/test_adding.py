"""What `add` does beside building: what acts and trains afterwards, and what it tells of types that have no name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import adapterkit as ak
from adapterkit.points import Kind
from adapterkit.specs import AdapterSpec
from adapterkit.testing import toys


@pytest.fixture
def adapters() -> ak.Adapters:
    toys.register()
    made = ak.Adapters(toys.ToyModel())
    made.add("first", ak.LoRA(rank=2))
    return made


def training(adapters: ak.Adapters) -> set[str]:
    return {name for name in adapters if any(p.requires_grad for p in adapters.parameters(name))}


@pytest.mark.parametrize("activate", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_what_acts_and_trains_after_a_second_add(adapters: ak.Adapters, activate: bool, train: bool):
    report = adapters.add("second", ak.LoRA(rank=2), activate=activate, train=train)
    assert adapters.active == {"second" if activate else "first": 1.0}
    assert training(adapters) == {"second" if train else "first"}
    assert (report.weight is not None, report.trainable) == (activate, train)


def test_a_first_adapter_that_neither_acts_nor_trains_leaves_the_base_as_it_is():
    toys.register()
    model = toys.ToyModel()
    before, tokens = model(toys.ids()), toys.ids()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(), activate=False, train=False)
    assert adapters.active == {}
    assert all(p.requires_grad for name, p in model.named_parameters() if "adapterkit" not in name)
    assert not any(p.requires_grad for p in adapters.parameters("a"))
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("config", [ak.LoRA(rank=2), ak.Bottleneck(), ak.Prefix(length=2)], ids=repr)
def test_start_values_are_the_same_whatever_torchs_default_device_is(config: ak.AdapterConfig):
    toys.register()
    plain, around = ak.Adapters(toys.ToyModel()), ak.Adapters(toys.ToyModel())
    plain.add("a", config)
    with torch.device("meta"):
        around.add("a", config)
    assert all(map(torch.equal, plain.parameters("a"), around.parameters("a")))


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_parameters_are_of_the_dtype_that_is_asked_for_whatever_torchs_own_is(dtype: Any, expected: torch.dtype):
    toys.register()
    adapters = ak.Adapters(toys.ToyModel())
    torch.set_default_dtype(torch.float64)
    try:
        adapters.add("a", ak.LoRA(rank=2), dtype=dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in adapters.parameters("a")} == {expected}


def test_what_does_not_act_can_be_added_inside_a_block(adapters: ak.Adapters):
    with adapters.disabled():
        with pytest.raises(ak.StateError, match="inside such a block"):
            adapters.add("second", ak.LoRA(rank=2))
        adapters.add("second", ak.LoRA(rank=2), activate=False)
    assert adapters.active == {"first": 1.0}


@pytest.mark.parametrize("options", [{"activate": 1}, {"train": "no"}, {"activate": None}])
def test_options_are_true_or_false(adapters: ak.Adapters, options: dict[str, Any]):
    with pytest.raises(ak.ConfigError, match=f"{next(iter(options))} must be True or False"):
        adapters.add("second", ak.LoRA(), **options)
    assert list(adapters) == ["first"]


@dataclass(frozen=True)
class Nameless(ak.LoRA):
    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})


@ak.hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    return [AdapterSpec("nameless", f"{__name__}:Nameless", kinds={"weight"}, summary="for tests")]


@pytest.fixture
def registered() -> Iterator[None]:
    ak.get_plugin_manager().register(sys.modules[__name__], name="nameless")
    yield
    ak.get_plugin_manager().unregister(name="nameless")


@pytest.mark.parametrize("config", [Nameless(rank=2), ak.Union((ak.Bottleneck(), Nameless(rank=2)))])
def test_a_type_without_a_name_is_told_before_it_trains(adapters: ak.Adapters, config: ak.AdapterConfig):
    with pytest.warns(ak.UnregisteredTypeWarning, match=r"'second' cannot be saved: Nameless is not a registered"):
        adapters.add("second", config)
    assert "second" in adapters
    with pytest.raises(ak.PluginError, match="Nameless is not a registered"):
        adapters.save("second", "nowhere")


@pytest.mark.usefixtures("registered")
def test_a_type_with_a_name_is_not(adapters: ak.Adapters, recwarn: pytest.WarningsRecorder):
    adapters.add("second", ak.Union((ak.Bottleneck(), Nameless(rank=2))))
    assert not recwarn.list


def test_the_earlier_name_of_recompute_context_works_and_says_so(adapters: ak.Adapters):
    with pytest.warns(DeprecationWarning, match="is called recompute_context"):
        outside, inside = adapters.checkpoint_context()
    with outside, inside:
        pass
