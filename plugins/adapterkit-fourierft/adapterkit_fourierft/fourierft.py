"""FourierFT: a weight's update from a few coefficients of its spectrum (Gao et al. 2024, arXiv:2405.03003)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.kernels.weights import call_weight
from adapterkit.points import Kind

_MAX_COEFFICIENTS, _MAX_SCALE, _MAX_SEED = 2**20, 1e6, 2**63 - 1


class Places(nn.Module):
    """Random places in weights of every size that there is, `of_SIZE` [n]: all that have a size have the same.

    They are drawn from a seed once for all layers; files do not hold them.

    Args:
        counts: Size of a weight -> how many places are needed in it.
        seed: Of a generator of their own, so that whoever loads a file draws the same.
    """

    def __init__(self, counts: Mapping[int, int], seed: int) -> None:
        super().__init__()
        for size, count in counts.items():
            places = torch.empty(count, dtype=torch.int64)  # on the default device: nothing is drawn on the meta device
            if not places.is_meta:
                places = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].clone()
            self.register_buffer(f"of_{size}", places, persistent=False)


class FourierFTModule(ak.AdditiveModule):
    """`W + scaling * Re(ifft2(F))`: F is zero but for `spectrum` [n] at fixed random places. It starts at zero.

    The weight is taken as a matrix [out, all the rest].
    """

    def __init__(self, point: ak.InjectionPoint, coefficients: int, scaling: float) -> None:
        super().__init__()
        self.shape, self.layout, self.scaling = point.shape, point.layout, scaling
        self.columns = math.prod(point.shape[1:])
        self.spectrum = nn.Parameter(torch.zeros(coefficients))

    @property
    def places(self) -> Tensor:
        """Where in the weight as one row its numbers lie."""
        places: Tensor = getattr(self.shared, f"of_{math.prod(self.shape)}")
        return places.to(self.spectrum.device)[: len(self.spectrum)]

    def delta_weight(self) -> Tensor:
        """See `AdditiveModule`. The transform of n real numbers at places (u, v) is a sum of n cosines."""
        spectrum = self.spectrum.to(torch.promote_types(self.spectrum.dtype, torch.float32))  # as the transform asks
        flat = torch.zeros(self.shape[0] * self.columns, dtype=spectrum.dtype, device=spectrum.device)
        dense = flat.index_copy(0, self.places, spectrum)
        update = torch.fft.ifft2(dense.view(self.shape[0], self.columns)).real
        return (update * self.scaling).view(self.shape)

    def delta(self, x: Tensor) -> Tensor:
        weight = self.delta_weight()
        return call_weight(x, weight if self.layout.form == "embedding" else weight.to(x.dtype), None, self.layout)


@dataclass(frozen=True)
class FourierFT(ak.AdapterConfig):
    """`W + scaling * Re(ifft2(F))`, with n learnt numbers in F for each layer, at the same random places.

    Attributes:
        coefficients: n; a weight with fewer entries has as many as it has entries.
        scaling: The paper's alpha.
        location_seed: Of the places.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    common: ClassVar[frozenset[str]] = frozenset({"location_seed"})
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

    def count_at(self, point: ak.InjectionPoint) -> int:
        """The number of coefficients at a point."""
        return min(self.coefficients, math.prod(point.shape))

    def build(self, point: ak.InjectionPoint) -> FourierFTModule:
        return FourierFTModule(point, self.count_at(point), self.scaling)

    def shared(self, points: Sequence[ak.InjectionPoint]) -> Places:
        counts: dict[int, int] = {}
        for point in points:
            size = math.prod(point.shape)
            counts[size] = max(self.at(point).count_at(point), counts.get(size, 0))
        return Places(counts, self.location_seed)
