"""FourierFT: a weight's update from a few coefficients of its spectrum (Gao et al. 2024, arXiv:2405.03003)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.kernels.weights import call_weight
from adapterkit.points import Kind

_MAX_COEFFICIENTS, _MAX_SCALE, _MAX_SEED = 2**20, 1e6, 2**63 - 1


class FourierFTModule(ak.AdditiveModule):
    """`W + scaling * Re(ifft2(F))`: F is zero but for `spectrum` [n] at fixed random places. It starts at zero.

    The weight is taken as a matrix [out, all the rest].
    """

    def __init__(self, point: ak.InjectionPoint, coefficients: int, scaling: float, seed: int) -> None:
        super().__init__()
        self.shape, self.layout, self.scaling = point.shape, point.layout, scaling
        self.columns = math.prod(point.shape[1:])
        self.spectrum = nn.Parameter(torch.zeros(coefficients))
        self.register_buffer("places", _places(point.shape[0] * self.columns, coefficients, seed), persistent=False)

    def delta_weight(self) -> Tensor:
        """See `AdditiveModule`. The transform of n real numbers at places (u, v) is a sum of n cosines."""
        spectrum = self.spectrum.to(torch.promote_types(self.spectrum.dtype, torch.float32))  # as the transform asks
        flat = torch.zeros(self.shape[0] * self.columns, dtype=spectrum.dtype, device=spectrum.device)
        dense = flat.index_copy(0, cast("Tensor", self.places), spectrum)
        update = torch.fft.ifft2(dense.view(self.shape[0], self.columns)).real
        return (update * self.scaling).view(self.shape)

    def delta(self, x: Tensor) -> Tensor:
        weight = self.delta_weight()
        return call_weight(x, weight if self.layout.form == "embedding" else weight.to(x.dtype), None, self.layout)


def _places(size: int, count: int, seed: int) -> Tensor:
    """`count` different places out of `size`, drawn from a seed: whoever loads a file draws the same."""
    if torch.empty(0).is_meta:
        return torch.empty(count, dtype=torch.int64)
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].clone()


@dataclass(frozen=True)
class FourierFT(ak.AdapterConfig):
    """`W + scaling * Re(ifft2(F))`, with n learnt numbers in F for each layer, at the same random places.

    Attributes:
        coefficients: n; a weight with fewer entries has as many as it has entries.
        scaling: The paper's alpha.
        location_seed: Of the places.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attn.{q,v}"
    coefficients: int = 1000
    scaling: float = 150.0
    location_seed: int = 777

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.coefficients <= _MAX_COEFFICIENTS:
            found.append(f"coefficients must be from 1 to {_MAX_COEFFICIENTS}, not {self.coefficients!r}")
        if not 0 < abs(self.scaling) <= _MAX_SCALE:
            found.append(f"scaling must not be 0, and within {_MAX_SCALE:g}, not {self.scaling!r}")
        if not 0 <= self.location_seed <= _MAX_SEED:
            found.append(f"location_seed must be from 0 to {_MAX_SEED}, not {self.location_seed!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.cuts_groups:
            return "FourierFT acts on whole grouped convolutions"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> FourierFTModule:
        count = min(self.coefficients, math.prod(point.shape))
        return FourierFTModule(point, count, self.scaling, self.location_seed)
