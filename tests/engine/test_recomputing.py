"""Several adapters in one step, with activations that are computed twice: gradients are those without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.engine import recomputing
from adapterkit.testing import toys
from tests.values import randomize

TYPES: dict[str, ak.AdapterConfig] = {
    "weights": ak.LoRA(rank=2, targets="attn.* mlp.*"),
    "outputs": ak.Bottleneck(targets="attn mlp", reduction=2),
    "attentions": ak.Prefix(length=2),
    "one layer": ak.LoRA(rank=2, targets="attn.*@layer=0"),
}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    toys.register()


def blocks(adapters: ak.Adapters, run: Callable[[], Tensor]) -> Tensor:
    with adapters.activated("a"):
        first = run()
    with adapters.activated({"b": 0.5}):
        return first + run()


def defaults(adapters: ak.Adapters, run: Callable[[], Tensor]) -> Tensor:
    adapters.activate("a")
    first = run()
    adapters.activate("b")
    return first + run()


def routes(adapters: ak.Adapters, run: Callable[[], Tensor]) -> Tensor:
    with adapters.routed(["a", "b", None]):
        return run()


def inner(adapters: ak.Adapters, run: Callable[[], Tensor]) -> Tensor:
    with adapters.activated("a"):
        y = run()
        adapters_of_others = adapters.activated("b")
        with adapters_of_others:
            return y + run()


def model_of(layers: int = 2) -> Any:
    model: Any = toys.ToyModel(layers)

    def forward(ids: Tensor, *, twice: bool) -> Tensor:
        x = model.embed(ids)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False) if twice else block(x)
        return model.head(model.norm(x))

    model.run = forward
    return model


def gradients(config: ak.AdapterConfig, way: Any, *, twice: bool) -> list[Tensor | None]:
    model = model_of()
    adapters = ak.Adapters(model)
    for i, name in enumerate("ab"):
        adapters.add(name, config)
        randomize(adapters, name, i)
    adapters.train("a", "b")
    way(adapters, lambda: model.run(toys.ids(), twice=twice).square().sum()).backward()
    return [parameter.grad for parameter in adapters.parameters()]


@pytest.mark.parametrize("config", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("way", [blocks, defaults, routes, inner])
def test_gradients_are_those_of_what_acted(config: ak.AdapterConfig, way: Any) -> None:
    found, expected = gradients(config, way, twice=True), gradients(config, way, twice=False)
    assert any(one is not None for one in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_without_it_they_would_be_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputing, "_RECORD", None)  # as with a torch that keeps it otherwise
    found, expected = (gradients(TYPES["weights"], defaults, twice=twice) for twice in (True, False))
    assert not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))  # type: ignore[arg-type]


def test_a_backward_may_run_twice_and_side_inputs_come_along() -> None:
    found = []
    for twice in (True, False):
        model = model_of()
        adapters = ak.Adapters(model)
        adapters.add("a", TYPES["weights"])
        randomize(adapters, "a")
        with adapters.activated({"a": torch.tensor([0.2, 0.4, 0.6])}):
            loss = model.run(toys.ids(), twice=twice).square().sum()
        adapters.activate(None)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([parameter.grad for parameter in adapters.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_asked_where_one_adapter_acts_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(recomputing, "remember", asked.append)
    model = model_of()
    adapters = ak.Adapters(model)
    adapters.add("a", TYPES["weights"])
    model.run(toys.ids(), twice=True).sum().backward()
    assert not asked
    with adapters.activated("a"), torch.no_grad():
        model.run(toys.ids(), twice=False)
    assert not asked


@pytest.mark.slow
def test_models_of_transformers_that_checkpoint_themselves() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    found = []
    for twice in (True, False):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).train()
        if twice:
            model.activation_checkpointing_enable()
        adapters = ak.Adapters(model)
        for i, name in enumerate("ab"):
            adapters.add(name, ak.LoRA(rank=2))
            randomize(adapters, name, i)
        adapters.train("a", "b")
        blocks(adapters, lambda model=model: model(torch.arange(6)[None]).logits.square().sum()).backward()
        found.append([parameter.grad for parameter in adapters.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
