"""One batch, an adapter of its own for every row: each row equals the run with that adapter alone."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys
from tests.engine import test_read_weights
from tests.values import randomize

CONFIGS: dict[str, ak.AdapterConfig] = {
    "lora": ak.LoRA(rank=2, targets="all"),
    "wide": ak.LoRA(rank=5, targets="attn.q mlp.up"),
    "kv": ak.Prefix(length=2),
    "long": ak.Prefix(length=4),
    "neck": ak.Bottleneck(targets="attn mlp", activation="gelu", reduction=2),
}
ROUTES = ["lora", None, "kv", "neck", "wide", "long", "lora", None]


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    adapters = ak.Adapters(model)
    for i, (name, config) in enumerate(CONFIGS.items()):
        adapters.add(name, config)
        randomize(adapters, name, i)
    return adapters


def one_by_one(model: nn.Module, adapters: ak.Adapters, x: torch.Tensor, routes: list[str | None]) -> torch.Tensor:
    rows = []
    for row, name in zip(x, routes, strict=True):
        with adapters.activated(name):
            rows.append(model(row[None]))
    return torch.cat(rows)


def test_rows_equal_single_runs(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    x = toys.ids(batch=len(ROUTES))
    expected = one_by_one(model, adapters, x, ROUTES)
    adapters.activate("lora")
    before = model(x)
    with adapters.routed(ROUTES):
        assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-10)
        assert adapters.active["kv"] == [0, 0, 1, 0, 0, 0, 0, 0]
        assert "routed" in str(adapters.report())
    assert torch.equal(model(x), before)
    with adapters.routed([None] * len(ROUTES)), adapters.disabled():
        base = model(x)
    with adapters.routed([None] * len(ROUTES)):
        assert torch.equal(model(x), base)


def test_gradients_are_those_of_the_single_runs(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    x = toys.ids(batch=len(ROUTES))
    adapters.train(*CONFIGS)
    gradients = []
    for run in ("routed", "single"):
        if run == "routed":
            with adapters.routed(ROUTES):
                y = model(x)
        else:
            y = one_by_one(model, adapters, x, ROUTES)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in adapters.parameters() if p.grad is not None])
        for parameter in adapters.parameters():
            parameter.grad = None
    assert len(gradients[0]) == len(gradients[1]) == len(list(adapters.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(*gradients, strict=True))


def test_recomputed_activations_keep_their_routes(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    from torch.utils.checkpoint import checkpoint

    adapters.train(*CONFIGS)
    h = torch.randn(len(ROUTES), 5, toys.WIDTH, dtype=torch.float64)
    gradients = []
    for again in (False, True):
        with adapters.routed(ROUTES):
            block = model.blocks[0]
            context = adapters.recompute_context
            y = checkpoint(block, h, use_reentrant=False, context_fn=context) if again else block(h)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in adapters.parameters() if p.grad is not None])
        for parameter in adapters.parameters():
            parameter.grad = None
    assert len(gradients[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_threads_route_for_themselves(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    x = toys.ids(batch=3)
    plans: list[list[str | None]] = [["lora", "kv", None], ["neck", "neck", "wide"], [None, "long", "lora"]]
    expected = [one_by_one(model, adapters, x, plan) for plan in plans]
    wrong: list[int] = []

    def serve(index: int) -> None:
        for _ in range(20):
            with torch.no_grad(), adapters.routed(plans[index]):
                if not torch.allclose(model(x), expected[index], rtol=1e-9, atol=1e-9):
                    wrong.append(index)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_cannot_be_routed_is_an_error(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    x = toys.ids(batch=4)
    with adapters.routed(["lora", None]), pytest.raises(errors.RoutingError, match=r"2 samples.*has 4 rows"):
        model(x)
    with adapters.routed(["kv", None]), pytest.raises(errors.RoutingError, match="2 samples"):
        model(x)
    for routes, told in (("lora", "'lora'"), ([], r"\[\]"), (None, "None"), (3, "3")):
        with pytest.raises(
            errors.ConfigError, match=rf"routed\(\): expected one name or None for each .*, not {told}$"
        ):
            adapters.routed(routes).__enter__()  # type: ignore[arg-type]
    with pytest.raises(errors.UnknownNameError, match="Did you mean 'lora'"):
        adapters.routed(["loar", None]).__enter__()
    adapters.add("head", ak.Trainable("head", outputs=3))
    with pytest.raises(errors.RoutingError, match="head@toy it replaces the base, which other rows would need"):
        adapters.routed(["head", None]).__enter__()
    adapters.remove("head")
    with adapters.routed(["lora", None]), pytest.raises(errors.StateError, match="routed"):
        adapters.merge()
    adapters.merge("lora")
    with pytest.raises(errors.StateError, match="merged"):
        adapters.routed(["kv"]).__enter__()


def test_a_weight_that_is_read_serves_the_whole_batch() -> None:
    test_read_weights.register()
    model = test_read_weights.ReadModel(test_read_weights.Stack()).double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=1, targets="moe.up"))
    with pytest.raises(errors.RoutingError, match=r"'a' cannot be routed: the model reads the weight at moe\.up"):
        adapters.routed(["a", None]).__enter__()


def test_half_precision_and_compile(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    x = toys.ids(batch=3)
    routes = ["lora", None, "kv"]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with adapters.routed(routes):
        assert torch.allclose(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    with adapters.routed(routes[::-1]):
        assert torch.allclose(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    model.bfloat16()
    with adapters.routed(routes):
        assert model(x).dtype == torch.bfloat16
