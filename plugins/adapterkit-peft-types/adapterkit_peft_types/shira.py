"""SHiRA: a sparse update at fixed places, of high rank (Bhardwaj et al. 2024, arXiv:2406.13175)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.points import Kind

_MAX_RANK, _MAX_SEED = 2**12, 2**63 - 1
_MANY = 8
"""Times as many entries as numbers, from which on most that are drawn are different."""


class SHiRAModule(ak.AdditiveModule):
    """`W + D`: D is zero but for `values` [n] at `indices` [2, n], rows and columns of the weight as a matrix.

    Files hold the places.
    """

    def __init__(self, point: ak.InjectionPoint, count: int, seed: int | None) -> None:
        super().__init__()
        self.shape = point.shape
        self.matrix = (point.shape[0], math.prod(point.shape[1:]))
        self.values = nn.Parameter(torch.zeros(count))
        self.register_buffer("indices", _places(self.matrix, count, seed))

    def delta_weight(self) -> Tensor:
        rows, columns = cast("Tensor", self.indices).long()
        dense = torch.zeros(self.matrix, dtype=self.values.dtype, device=self.values.device)
        return dense.index_put((rows, columns), self.values).view(self.shape)


def _places(matrix: tuple[int, int], count: int, seed: int | None) -> Tensor:
    """`count` different places of a matrix, [2, count] in their order: drawn as PEFT draws them from a seed."""
    if torch.empty(0).is_meta:
        return torch.empty(2, count, dtype=torch.int32)
    size = math.prod(matrix)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    places = _few(size, count) if seed is None and count * _MANY < size else None
    if places is None:
        places = torch.randperm(size, generator=generator, device="cpu")[:count]
    places = places.sort().values
    return torch.stack((places // matrix[1], places % matrix[1])).int()


def _few(size: int, count: int) -> Tensor | None:
    """`count` different numbers below `size`, without a permutation of all; None where too many were drawn twice."""
    drawn = torch.randint(size, (2 * count,), device="cpu").unique()
    return drawn[torch.randperm(len(drawn), device="cpu")[:count]] if len(drawn) >= count else None


@dataclass(frozen=True)
class SHiRA(ak.AdapterConfig):
    """`W + D` with rank * (in + out) learnt numbers at random places of D: as many as LoRA has, of a higher rank.

    Attributes:
        rank: Of a LoRA with as many numbers.
        seed: Of the places, alike for all weights of a size; None for those that the adapter's own seed gives.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    rank: int = 32
    seed: int | None = None

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}")
        if self.seed is not None and not 0 <= self.seed <= _MAX_SEED:
            found.append(f"seed must be None or from 0 to {_MAX_SEED}, not {self.seed!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if reason := super().accepts(point):
            return reason
        if point.cuts_groups:
            return "SHiRA acts on whole grouped convolutions"
        out, width = point.shape[0], math.prod(point.shape[1:])
        if self.rank * (out + width) > out * width:
            most = out * width // (out + width)
            return f"rank {self.rank} asks for more numbers than its weight has: set rank to {most} at most"
        return None

    def alike(self, point: ak.InjectionPoint) -> tuple[Hashable, ...]:
        return (point.shape, self.rank, self.seed)

    def build(self, point: ak.InjectionPoint) -> SHiRAModule:
        count = self.rank * (point.shape[0] + math.prod(point.shape[1:]))
        return SHiRAModule(point, count, self.seed)
