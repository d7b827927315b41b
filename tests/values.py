"""Values for the parameters of an adapter under test."""

from __future__ import annotations

import torch

import adapterkit as ak


def randomize(adapters: ak.Adapters, name: str, seed: int = 0) -> None:
    """Gives every parameter a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.normal_(0, 0.3, generator=generator)
