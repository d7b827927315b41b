"""Under DistributedDataParallel: two processes train an adapted model to what one trains it to, routed or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, distributed

import adapterkit as ak
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids(batch=4)
CHOICES = {"one": "lora", "expression": ak.Stack("lora", "neck"), "routed": ["lora", None, "neck", "lora"]}


def adapted() -> tuple[toys.ToyModel, ak.Adapters]:
    toys.register()
    model = toys.ToyModel().double()
    adapters = ak.Adapters(model)
    for name, config in (("lora", ak.LoRA(rank=2, targets="all")), ("neck", ak.Bottleneck(width=3, activation="gelu"))):
        adapters.add(name, config)
        randomize(adapters, name)
    adapters.train("lora", "neck")
    return model, adapters


def gradients(model: torch.nn.Module, adapters: ak.Adapters, choice: object, rows: slice) -> list[Tensor]:
    acting = adapters.routed(choice[rows]) if isinstance(choice, list) else adapters.activated(choice)  # type: ignore
    with acting:
        model(X[rows]).square().mean().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in adapters.parameters()]
    for parameter in adapters.parameters():
        parameter.grad = None
    return grads


def work(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        model, adapters = adapted()
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        assert ak.Adapters(wrapped).active == adapters.active  # the wrapper is looked through
        rows = slice(2 * rank, 2 * rank + 2)
        found = {name: gradients(wrapped, adapters, choice, rows) for name, choice in CHOICES.items()}
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    model, adapters = adapted()
    for name, choice in CHOICES.items():
        expected = gradients(model, adapters, choice, slice(0, 4))
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{rank}.pt")[name]
            assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, expected, strict=True))
