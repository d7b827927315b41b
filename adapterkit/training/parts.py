"""A base model as the loop sees it: one module, or the modules of a pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.points import Points


def describe(model: Any, chosen: Points) -> str:
    """The first line of a run: what trains, and where."""
    trainable = sum(chosen.costs.values())
    total = sum(p.numel() for part in parts_of(model).values() for p in part.parameters())
    roles = ", ".join(sorted({point.role for point in chosen}))
    return (
        f"training {trainable:,} of {total + trainable:,} parameters ({trainable / (total + trainable):.2%}) "
        f"at {len(chosen)} points ({roles})"
    )


@contextlib.contextmanager
def inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode and the global generator are put back."""
    modules = [module for part in parts_of(model).values() for module in part.modules()]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def parts_of(model: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline by component, or the one module there is."""
    if isinstance(model, nn.Module):
        return {"model": model}
    return {name: part for name, part in model.components.items() if isinstance(part, nn.Module)}


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor of nested mappings and sequences on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
