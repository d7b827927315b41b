"""Small adapters to work on, with random values, and what they do to the weights of their model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint
from adapterkit.testing import families, toys


def checkpoint(
    config: ak.AdapterConfig, model: nn.Module | None = None, seed: int = 0, **options: object
) -> Checkpoint:
    """A new adapter's, its parameters drawn anew."""
    families.register()
    adapters = ak.Adapters(toys.ToyModel() if model is None else model)
    adapters.add("a", config, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return adapters.checkpoint("a")


def changes(checkpoint: Checkpoint, model: nn.Module, weight: float = 1.0) -> Mapping[str, Tensor]:
    """Name -> what a merge adds to each parameter of the model that it changes, in float64."""
    families.register()
    model = model.double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapters = ak.Adapters(model)
    adapters.install("a", checkpoint)
    adapters.activate({"a": weight})
    adapters.merge()
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = {n: after[n] - before.get(n, torch.zeros(())) for n in after if ".adapterkit." not in n}
    return {name: change.clone() for name, change in found.items() if change.any()}


def norm(changes: Mapping[str, Tensor]) -> float:
    return float(torch.stack([change.square().sum() for change in changes.values()]).sum().sqrt())


def less(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    zero = torch.zeros(())
    return {name: one.get(name, zero) - other.get(name, zero) for name in {**one, **other}}
