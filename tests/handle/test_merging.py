"""What a merge writes: the biases of a stack, weights on the meta device or behind a replaced forward, zero weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.backend import Backend
from adapterkit.handle.stand_ins import replace_layer
from adapterkit.mapping.family import Experts, Group, resolve
from adapterkit.specs import BackendSpec
from adapterkit.testing import toys
from tests.values import randomize

EXPERTS, WIDTH = 3, 4


class Experts3(nn.Module):
    """A stack of layers in one parameter, read one by one; its biases too, where it has any."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] to [n, experts, width]."""
        weights, biases = self.up, self.up_bias
        rows = [x @ weights[i].T + (0 if biases is None else biases[i]) for i in range(EXPERTS)]
        return torch.stack(rows, dim=1)


class StackBackend(Backend):
    """Maps `Experts3`."""

    def points(self, model: nn.Module, component: str) -> list[ak.InjectionPoint]:
        return resolve(model, [Group("", "", (Experts(("moe.up",), "", "up", "up_bias"),))], component)


class Shifted(ak.AdapterModule):
    """Adds to the weight and to the bias."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.shift, self.bias = nn.Parameter(torch.zeros(point.shape)), nn.Parameter(torch.zeros(point.out_features))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own = self.bias.to(weight.dtype)
        return weight + self.shift.to(weight.dtype), own if bias is None else bias + own


@dataclass(frozen=True)
class Shift(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "moe.up"

    def build(self, point: ak.InjectionPoint) -> Shifted:
        return Shifted(point)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    manager = ak.get_plugin_manager()
    spec = BackendSpec("stack_of_three", f"{__name__}:StackBackend", models=("nowhere:Experts3",))

    class Plugin:
        @ak.hookimpl
        def adapterkit_register_backends(self) -> list[BackendSpec]:
            return [spec]

    manager.register(Plugin(), name="stack_of_three")
    yield
    manager.unregister(name="stack_of_three")


def stack(*, bias: bool, targets: str = "moe.up") -> tuple[Experts3, ak.Adapters]:
    torch.manual_seed(0)
    model = Experts3(bias=bias)
    adapters = ak.Adapters(model, backend="stack_of_three")
    adapters.add("a", Shift(targets=targets))
    randomize(adapters, "a")
    return model, adapters


def test_the_biases_of_a_stack_are_folded_in_where_adapters_change_them() -> None:
    model, adapters = stack(bias=True, targets="moe.up@expert=1")
    before, x = [p.detach().clone() for p in model.parameters()], torch.randn(2, WIDTH)
    shift = adapters.modules("a")["moe.up@model.1"]
    assert isinstance(shift, Shifted)
    adapters.merge()
    weights, biases = model._parameters["up"], model._parameters["up_bias"]
    assert weights is not None
    assert biases is not None
    assert torch.equal(weights[1], before[0][1] + shift.shift)
    assert torch.equal(biases[1], before[1][1] + shift.bias)
    for other in (0, 2):
        assert torch.equal(weights[other], before[0][other])
        assert torch.equal(biases[other], before[1][other])
    expected = torch.stack([x @ weights[i].T + biases[i] for i in range(EXPERTS)], dim=1)
    assert torch.equal(model(x), expected)
    adapters.unmerge()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=False))


def test_a_stack_without_biases_takes_none() -> None:
    model, adapters = stack(bias=False)
    before = model._parameters["up"]
    with pytest.raises(errors.NotMergeableError, match="the experts have no bias, and merging needs one"):
        adapters.merge()
    assert model._parameters["up"] is before


def test_weights_without_values_are_merged_without_values() -> None:
    """The meta device alone is no offloading: a skeleton is merged as the model would be."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    before = model[0]._parameters["weight"]
    adapters.merge()
    merged = model[0]._parameters["weight"]
    assert merged is not before
    assert merged is not None
    assert merged.is_meta
    adapters.unmerge()
    assert model[0]._parameters["weight"] is before


def test_a_replaced_forward_alone_is_no_offloading() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    randomize(adapters, "a")
    layer: Any = model[0]
    layer.forward = functools.partial(type(layer).forward, layer)  # another library's hook, the weights at hand
    expected = model(x)
    adapters.merge()
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_what_has_no_weight_is_not_merged() -> None:
    """An adapter that could not be merged is no obstacle where it has weight 0."""
    toys.register()
    model: Any = toys.ToyModel()
    adapters = ak.Adapters(model)
    adapters.add("both", ak.Union(parts=(ak.LoRA(rank=2, targets="mlp.up"), ak.Bottleneck(width=2))))
    with pytest.raises(errors.NotMergeableError, match="not on a weight"):
        adapters.merge()
    before = [module._parameters["weight"] for module in (model.blocks[0].up, model.blocks[0].down)]
    adapters.activate({"both": {"mlp.up@layer=0": 1.0, "*": 0.0}})
    adapters.merge()
    after = [module._parameters["weight"] for module in (model.blocks[0].up, model.blocks[0].down)]
    assert after[0] is not before[0]
    assert after[1] is before[1]
    assert model.blocks[1].up._parameters["weight"] is not None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_comes_back_to_where_the_model_is_by_then(device: str) -> None:
    model = nn.Linear(4, 4)
    ak.Adapters(model).add("a", ak.LoRA(rank=2, targets="*"))
    before = model.weight
    original = replace_layer(model, "", nn.Linear(4, 4).to(device))
    assert model.weight is not before
    original.restore()
    assert model.weight.device.type == device
    assert device == "meta" or model.weight is before
