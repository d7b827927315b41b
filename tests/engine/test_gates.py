"""Weights that are tensors: for each row, or each row and token, with their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit import errors
from adapterkit.kernels.gates import Gates
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids()  # [rows, tokens]


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    made = ak.Adapters(model)
    for name in ("a", "b"):
        made.add(name, ak.LoRA(rank=2, targets="attn.* mlp.*"))
        randomize(made, name)
    made.freeze()
    return made


def test_weights_of_rows_are_those_of_each_row(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    a = torch.linspace(-0.5, 1.5, len(X), dtype=torch.float64)
    b = torch.zeros(len(X), dtype=torch.float64)
    with adapters.activated({"a": a, "b": b}):
        y = model(X)
    for i in range(len(X)):
        with adapters.activated({"a": float(a[i])}):
            assert torch.allclose(y[i], model(X[i : i + 1])[0], atol=1e-10)


@pytest.mark.parametrize("axes", [1, 2])
def test_gradients_reach_the_weights(model: toys.ToyModel, adapters: ak.Adapters, axes: int) -> None:
    shape = X.shape[:axes]
    weights = {name: torch.rand(shape, dtype=torch.float64) for name in ("a", "b")}
    weights["b"].flatten()[0] = 0.0  # a weight of 0 has a gradient too

    def run(a: Tensor, b: Tensor) -> Tensor:
        with adapters.activated({"a": a, "b": b}):
            return model(X)

    inputs = tuple(w.requires_grad_() for w in weights.values())
    assert torch.autograd.gradcheck(lambda a, b: run(a, b).square().sum(), inputs, atol=1e-5)


def test_weights_of_tokens_by_selector_and_by_function(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    first, second = (torch.rand(X.shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with adapters.activated({"a": {"*@layer=0": first, "*@layer=1": second}}):
        y = model(X)
    with adapters.activated({"a": lambda point, step: (first, second)[int(point.tags["layer"])]}):
        assert torch.equal(model(X), y)
    with adapters.activated({"a": {"*@layer=0": first, "*": 0.5}}):
        half = model(X)
    half.sum().backward()
    assert first.grad is not None
    assert second.grad is None
    ones = torch.ones(X.shape, dtype=torch.float64)
    with adapters.activated({"a": ones, "b": 0.5}):
        found = model(X)
    with adapters.activated({"a": 1.0, "b": 0.5}):
        assert torch.allclose(found, model(X), atol=1e-12)


def test_what_cannot_be_weighted_so_is_refused(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    rows, tokens = torch.ones(len(X)), torch.ones(X.shape)
    adapters.add("kv", ak.Prefix())
    adapters.add("conv", ak.LoRA(rank=2, targets="conv"))
    adapters.add("head", ak.Trainable("head", outputs=3))
    adapters.add("whole", ak.Trainable("norm"))
    for choice, message in (
        ({"kv": rows}, "at attn.kv@toy.0 there is no output of its own"),
        ({"whole": rows}, "there is no output of its own"),
        ({"conv": tokens}, "there is no axis of tokens at conv@toy.0"),
        ({"head": rows}, "it acts or does not at head@toy"),
    ):
        with pytest.raises(errors.RoutingError, match=message), adapters.activated(choice):  # type: ignore
            pass
    for wrong in (torch.ones(2, 2, 2), torch.ones(3).long(), torch.tensor(1.0)):
        with pytest.raises(errors.ConfigError, match=r"must be a floating-point tensor \[rows\]"):
            adapters.activate({"a": wrong})
    with adapters.activated({"conv": rows}):
        model(X)
    with adapters.activated({"a": rows[1:]}), pytest.raises(errors.RoutingError, match="one for each row, but an"):
        model(X)
    with adapters.activated({"a": tokens[:, 1:]}), pytest.raises(errors.RoutingError, match="one for each row and tok"):
        model(X)
    with adapters.activated({"a": rows}), pytest.raises(errors.StateError, match="samples are routed here"):
        adapters.merge()
    with pytest.raises(errors.RoutingError, match="one for each row and token"):  # windows, heads
        Gates(tokens).scaled(torch.ones(*X.shape, 2, 3))
    adapters.activate({"a": {"*": rows}})
    with pytest.raises(errors.StateError, match="samples are routed here"):
        adapters.merge()
