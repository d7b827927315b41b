"""A loop that never tells a type of its steps is warned, once; any other is not."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch

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
