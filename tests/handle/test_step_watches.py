"""A loop that never tells a type of its steps is warned, once; any other is not."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

import adapterkit as ak
from adapterkit.testing import toys

ADALORA = ak.AdaLoRA(rank=2, targets="attn.*")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    toys.register()


def warned(config: ak.AdapterConfig, steps: int = 6, tell: bool = False, micro: int = 1, **options: Any) -> list[str]:
    """What a loop is told."""
    model = toys.ToyModel()
    adapters = ak.Adapters(model)
    adapters.add("x", config)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            for _ in range(micro):
                model(toys.ids()).sum().backward()
            optimizer.step()
            if tell:
                adapters.after_step(step + 1, steps)
            optimizer.zero_grad()
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("config", [ADALORA, ak.Union((ADALORA, ak.LoRA(rank=2, targets="mlp.*")))])
def test_a_loop_that_tells_of_no_step_is_warned_once(config: ak.AdapterConfig) -> None:
    [told] = warned(config)
    assert "'x'" in told
    assert "adapters.after_step(step, steps)" in told
    assert len(warned(config, foreach=True)) == 1
    assert len(warned(config, fused=True)) == 1  # which leaves the versions of parameters: transformers' default


def kept(adapters: ak.Adapters) -> list[int]:
    return [int(tensor.sum()) for key, tensor in adapters.state_dict("x").items() if key.endswith("/kept")]


@pytest.mark.filterwarnings("ignore:'x'")
@pytest.mark.parametrize("final", [0, 5])
def test_from_then_on_it_is_told_until_the_loop_does(final: int) -> None:
    model = toys.ToyModel()
    adapters = ak.Adapters(model)
    adapters.add("x", ak.AdaLoRA(rank=2, targets="attn.*", final=final))
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    gc.collect()
    before, found = len(_global_optimizer_post_hooks) - 1, []
    for _ in range(6):
        model(toys.ids()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(sum(kept(adapters)))
    points = len(kept(adapters))
    assert found[0] == found[2] == 3 * points
    assert found[-1] == 2 * points
    for module in adapters.modules("x").values():
        assert int((module.E != 0).sum()) <= int(module.kept.sum())  # type: ignore[operator,union-attr]
    assert len(_global_optimizer_post_hooks) == before + 1
    adapters.after_step(7, 10)
    assert len(_global_optimizer_post_hooks) == before


@pytest.mark.filterwarnings("ignore:'x'")
def test_no_model_is_kept_alive_by_it() -> None:
    gc.collect()  # models of other tests
    before = len(_global_optimizer_post_hooks)
    model = toys.ToyModel()
    adapters = ak.Adapters(model)
    adapters.add("x", ADALORA)
    optimizer = torch.optim.SGD(adapters.parameters(), lr=1e-2)
    for _ in range(5):
        model(toys.ids()).sum().backward()
        optimizer.step()
    assert len(_global_optimizer_post_hooks) == before + 1
    gone = weakref.ref(model)
    del model, adapters, optimizer
    gc.collect()
    assert gone() is None
    assert len(_global_optimizer_post_hooks) == before


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (ADALORA, {"tell": True}),
        (ADALORA, {"steps": 1, "micro": 8}),  # many backwards are no steps
        (ak.LoRA(rank=2), {}),
        (ak.Union((ak.LoRA(rank=2), ak.LoRA(rank=2, targets="mlp.*"))), {}),
    ],
)
def test_others_are_not(config: ak.AdapterConfig, options: Any) -> None:
    assert not warned(config, **options)


def test_models_are_copied_and_pickled_all_the_same() -> None:
    model = toys.ToyModel()
    adapters = ak.Adapters(model)
    adapters.add("x", ADALORA)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(toys.ids()), model(toys.ids()))
        ak.Adapters(copied).after_step(1, 2)
