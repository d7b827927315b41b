"""The usual case, one adapter that adds to a layer's output, takes a short way: it must stay short, and see all."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import adapterkit as ak
from adapterkit.adapters.lora import LoRAModule
from adapterkit.testing import toys
from tests.values import randomize

X = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PACKAGE = str(Path(ak.__file__).parent)


class Called(nn.Module):
    """A layer that is given its input by place, and one by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=self.first(x))


@pytest.fixture
def model() -> Called:
    torch.manual_seed(0)
    return Called().double().eval()


@pytest.fixture
def adapters(model: Called) -> ak.Adapters:
    adapters = ak.Adapters(model)
    for place, (name, targets) in enumerate({"a": "path:first", "b": "path:second", "both": "*"}.items()):
        adapters.add(name, ak.LoRA(rank=2, alpha=3.0, targets=targets))
        randomize(adapters, name, place)
    return adapters


def frames(call: Callable[[], object]) -> list[str]:
    """Functions of the package that a call enters, when it is not the first."""
    found: list[str] = []

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code.co_name)

    call()
    before = sys.getprofile()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def equation(model: Called, adapters: ak.Adapters, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
    module: Any = next(iter(adapters.modules(name).values()))
    return x @ layer.weight.T + layer.bias + 1.5 * x @ module.A.T @ module.B.T


@torch.no_grad()
def test_a_call_enters_few_functions(model: Called, adapters: ak.Adapters) -> None:
    """Here a layer's weight and bias may be read, so that each of them asks."""
    adapters.freeze()
    for choice in ("a", "b", None):
        adapters.activate(choice)
        entered = frames(lambda: model.first(X))
        assert len(entered) <= 11, (choice, entered)


@torch.no_grad()
def test_a_call_of_a_layer_that_is_only_called_enters_fewer() -> None:
    toys.register()
    model = toys.ToyModel().double().eval()
    layer, x = model.get_submodule("blocks.0.attn.proj"), torch.ones(1, 1, toys.WIDTH, dtype=torch.float64)
    adapters = ak.Adapters(model)
    adapters.add("here", ak.LoRA(rank=2, targets="attn.o"))
    adapters.add("there", ak.LoRA(rank=2, targets="attn.v"))
    adapters.freeze()
    for choice, most in (("here", 6), ("there", 3), (None, 3)):
        adapters.activate(choice)
        entered = frames(lambda: layer(x))
        assert len(entered) <= most, (choice, entered)


@torch.no_grad()
def test_it_gives_what_the_equation_says(model: Called, adapters: ak.Adapters) -> None:
    adapters.activate("a")
    for _ in range(3):
        torch.testing.assert_close(model.first(X), equation(model, adapters, "a", model.first, X))
        torch.testing.assert_close(model.first(input=X), equation(model, adapters, "a", model.first, X))
        for parameter in adapters.parameters("a"):
            parameter.mul_(-0.5)  # in place: nothing of it is kept


def test_a_step_of_an_optimizer_is_seen_at_once(model: Called, adapters: ak.Adapters) -> None:
    adapters.activate("a")
    adapters.train("a")
    optimizer = torch.optim.SGD(adapters.parameters("a"), lr=0.1)
    for _ in range(2):
        model(X).sum().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(model.first(X), equation(model, adapters, "a", model.first, X))


@torch.no_grad()
def test_a_hook_that_comes_later_runs_and_one_that_goes_does_not(model: Called, adapters: ak.Adapters) -> None:
    adapters.activate("a")
    y = model.first(X)
    module = next(iter(adapters.modules("a").values()))
    seen: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_: seen.append("after")),
        module.register_forward_pre_hook(lambda *_: seen.append("before")),
    ]
    assert torch.equal(model.first(X), y)
    assert seen == ["before", "after"]
    for hook in hooks:
        hook.remove()
    model.first(X)
    own: Any = module.forward
    module.forward = lambda *args: seen.append("instead") or own(*args)  # type: ignore[method-assign]
    assert torch.equal(model.first(X), y)
    del module.forward
    assert torch.equal(model.first(X), y)
    assert seen == ["before", "after", "instead"]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@torch.no_grad()
@pytest.mark.parametrize("name", ["A", "B"])
def test_a_factor_may_be_parametrized_later(model: Called, adapters: ak.Adapters, name: str) -> None:
    adapters.activate("a")
    y = model.first(X)
    base = model.first.weight @ X.unsqueeze(-1)
    base = base.squeeze(-1) + model.first.bias
    module = next(iter(adapters.modules("a").values()))
    parametrize.register_parametrization(module, name, Doubled())
    torch.testing.assert_close(model.first(X), base + 2 * (y - base))


@torch.no_grad()
def test_a_functional_call_brings_its_own_factors(model: Called, adapters: ak.Adapters) -> None:
    adapters.activate("a")
    y = model(X)
    other = {key: torch.zeros_like(one) for key, one in model.named_parameters() if key.endswith(".a.B")}
    assert other
    with adapters.disabled():
        base = model(X)
    torch.testing.assert_close(torch.func.functional_call(model, other, (X,)), base)
    assert torch.equal(model(X), y)


@torch.no_grad()
def test_a_context_that_outlives_its_block_keeps_what_the_block_said(model: Called, adapters: ak.Adapters) -> None:
    adapters.activate("a")
    y = model(X)
    with adapters.activated("b"):
        inside, kept = model(X), contextvars.copy_context()
    assert torch.equal(model(X), y)
    assert torch.equal(kept.run(model, X), inside)
    del kept
    assert not torch.equal(inside, y)
    assert torch.equal(model(X), y)


class OwnDelta(LoRAModule):
    def delta(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().delta(x) + 1


class OwnAdded(LoRAModule):
    def added(self, x: Tensor, y: Tensor) -> Tensor:
        return super().added(x, y) + 1


@torch.no_grad()
@pytest.mark.parametrize("own", [OwnDelta, OwnAdded])
def test_a_type_says_itself_what_it_adds(model: Called, adapters: ak.Adapters, own: type[LoRAModule]) -> None:
    adapters.activate("a")
    y = model.first(X)

    class Own(ak.LoRA):
        def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
            return own(*self.arguments(point))

    with pytest.warns(ak.UnregisteredTypeWarning):
        adapters.add("own", Own(rank=2, alpha=3.0, targets="path:first"))
    for one, other in zip(adapters.parameters("own"), adapters.parameters("a"), strict=True):
        one.copy_(other)
    adapters.activate("own")
    torch.testing.assert_close(model.first(X), y + 1)
    assert torch.equal(model.first(X), model.first(input=X))
