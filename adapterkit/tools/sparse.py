"""Merges of dense updates that interfere less than a sum: by dropping most entries, and by agreeing on a sign."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Drop = Callable[[Tensor, float, torch.Generator], Tensor]
"""(update, density, random numbers) -> the update without most of its entries."""


def largest(update: Tensor, density: float, _: torch.Generator) -> Tensor:
    """The entries of largest magnitude; of equal ones the first."""
    kept = max(1, round(density * update.numel()))
    flat = update.flatten()
    places = flat.abs().topk(kept).indices
    return torch.zeros_like(flat).index_copy(0, places, flat[places]).view_as(update)


def at_random(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Entries drawn at random, scaled up so that the expectation stays (DARE: Yu et al. 2024, arXiv:2311.03099)."""
    kept = torch.rand(update.shape, generator=generator).to(update.device) < density
    return update * kept / density


def total(updates: Sequence[Tensor]) -> Tensor:
    """The sum."""
    return torch.stack([*updates]).sum(0)


def agreeing(updates: Sequence[Tensor]) -> Tensor:
    """In each place the mean of those that have the sign of the sum (TIES: Yadav et al. 2023, arXiv:2306.01708)."""
    stacked = torch.stack([*updates])
    agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp_min(1)


METHODS: Mapping[str, tuple[Drop, Callable[[Sequence[Tensor]], Tensor]]] = {
    "magnitude": (largest, total),
    "ties": (largest, agreeing),
    "dare": (at_random, total),
    "dare_ties": (at_random, agreeing),
}


def merged(method: str, updates: Sequence[Tensor], weights: Sequence[float], density: float, seed: str) -> Tensor:
    """One update of several.

    Args:
        method: One of `METHODS`.
        updates: Of one weight, all of its shape.
        weights: Factor on each.
        density: The part of the entries that each keeps.
        seed: Of what is drawn: equal ones draw alike.
    """
    drop, together = METHODS[method]
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return together([w * drop(update, density, generator) for w, update in zip(weights, updates, strict=True)])
