"""WaveFT: an update from a few coefficients of its wavelet transform (Bilican et al. 2025, arXiv:2505.12532)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.points import Kind
from adapterkit_peft_types import wavelets

_MAX_COEFFICIENTS, _MAX_SCALE, _MAX_SEED = 2**24, 1e6, 2**63 - 1


class Places(nn.Module):
    """Random places in weights of every size that there is, `of_SIZE` [n]: all that have a size have the same.

    They are drawn from a seed once for all layers, as PEFT draws them for each; files do not hold them.

    Args:
        counts: Size of a weight -> how many places are needed in it.
        seed: Of a generator of their own.
    """

    def __init__(self, counts: Mapping[int, int], seed: int) -> None:
        super().__init__()
        for size, count in counts.items():
            places = torch.empty(count, dtype=torch.int64)  # on the default device: nothing is drawn on the meta device
            if not places.is_meta:
                places = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].clone()
            self.register_buffer(f"of_{size}", places, persistent=False)


class WaveFTModule(ak.AdditiveModule):
    """`W + scaling * S(F)`: S puts a matrix together from one level of wavelet coefficients.

    F is zero but for `values` [n] at fixed random places. The weight is taken as a matrix [out, all the rest].
    """

    def __init__(self, point: ak.InjectionPoint, config: WaveFT) -> None:
        super().__init__()
        self.shape, self.scaling = point.shape, config.scaling
        self.matrix = (point.shape[0], math.prod(point.shape[1:]))
        self.filters = wavelets.synthesis(config.wavelet) if config.transform else None
        self.values = nn.Parameter(torch.zeros(config.count_at(point)))

    def delta_weight(self) -> Tensor:
        values = self.values.to(torch.promote_types(self.values.dtype, torch.float32)) * self.scaling
        places: Tensor = getattr(self.shared, f"of_{math.prod(self.matrix)}").to(values.device)[: len(values)]
        return _updated(values, places, self.matrix, self.filters).reshape(self.shape)


def _updated(
    values: Tensor, places: Tensor, matrix: tuple[int, int], filters: tuple[tuple[float, ...], ...] | None
) -> Tensor:
    """The matrix that has these coefficients, each of which is a small patch of it; without filters, these entries.

    Coefficients lie in a matrix with a margin of what putting together cuts off: its quarters are the smooth part,
    details along rows, along columns, along both.
    """
    out, width = matrix
    dense = torch.zeros(out * width, dtype=values.dtype, device=values.device)
    if filters is None:
        return dense.index_copy(0, places, values).view(matrix)
    margin = len(filters[0]) - 2
    taps = torch.tensor(filters, dtype=values.dtype, device=values.device)
    (row, bottom), (column, right) = (_halved(places // width, out, margin), _halved(places % width, width, margin))
    down, across = taps[right] * values[:, None], taps[bottom]  # details along rows are on the right
    columns = (2 * column - margin)[:, None] + torch.arange(len(filters[0]), device=values.device)
    for tap in range(len(filters[0])):
        at = 2 * row[:, None] - margin + tap
        inside = (at >= 0) & (at < out) & (columns >= 0) & (columns < width)
        patch = torch.where(inside, down[:, tap, None] * across, 0)
        dense.index_put_((torch.where(inside, at * width + columns, 0),), patch, accumulate=True)
    return dense.view(matrix)


def _halved(index: Tensor, side: int, margin: int) -> tuple[Tensor, Tensor]:
    """Places along a side within the half that they are in, with a margin around the side, and which half it is."""
    whole = side + margin + side % 2
    inside = index + (whole - side) // 2
    return inside % (whole // 2), inside // (whole // 2)


@dataclass(frozen=True)
class WaveFT(ak.AdapterConfig):
    """`W + scaling * S(F)`, with n learnt coefficients in F for each layer, at random places.

    Attributes:
        coefficients: n; a weight with fewer entries has as many as it has entries.
        scaling: Factor on the update.
        wavelet: Its name: db1 to db10, sym2 to sym10, coif1 to coif4.
        transform: False for entries of the weight instead of coefficients.
        location_seed: Of the places.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    common: ClassVar[frozenset[str]] = frozenset({"location_seed"})
    targets: str = "attention"
    coefficients: int = 2592
    scaling: float = 25.0
    wavelet: str = "db1"
    transform: bool = True
    location_seed: int = 777

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.coefficients <= _MAX_COEFFICIENTS:
            found.append(f"coefficients must be from 1 to {_MAX_COEFFICIENTS}, not {self.coefficients!r}")
        if not 0 < abs(self.scaling) <= _MAX_SCALE:
            found.append(f"scaling must not be 0, and within {_MAX_SCALE:g}, not {self.scaling!r}")
        if self.wavelet not in wavelets.NAMES:
            found.append(f"wavelet must be one of {', '.join(wavelets.NAMES)}, not {self.wavelet!r}")
        if not 0 <= self.location_seed <= _MAX_SEED:
            found.append(f"location_seed must be from 0 to {_MAX_SEED}, not {self.location_seed!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.cuts_groups:
            return "WaveFT acts on whole grouped convolutions"
        return super().accepts(point)

    def count_at(self, point: ak.InjectionPoint) -> int:
        """The number of coefficients at a point."""
        return min(self.coefficients, math.prod(point.shape))

    def alike(self, point: ak.InjectionPoint) -> tuple[Hashable, ...]:
        return (point.shape, self.coefficients, self.scaling, self.wavelet, self.transform)

    def build(self, point: ak.InjectionPoint) -> WaveFTModule:
        return WaveFTModule(point, self)

    def shared(self, points: Sequence[ak.InjectionPoint]) -> Places:
        counts: dict[int, int] = {}
        for point in points:
            size = math.prod(point.shape)
            counts[size] = max(self.at(point).count_at(point), counts.get(size, 0))
        return Places(counts, self.location_seed)
