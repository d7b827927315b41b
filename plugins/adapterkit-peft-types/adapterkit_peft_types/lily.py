"""Lily: low-rank updates with second factors that all layers share and mix (Zhong et al. 2024, arXiv:2407.09946)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit.errors import did_you_mean
from adapterkit_peft_types.ranked import Ranked

_MAX_EXPERTS, _MAX_STRIDE, _MAX_SCALE = 2**10, 2**16, 1e4
_OVER = ("sample", "batch")


class Factors(nn.Module):
    """All A [rank, in] and B [experts, rank, out] of an adapter.

    Args:
        a, b: The sizes of each: inputs, outputs.
        places: Point id -> which A and which B.
        rank, experts: See `Lily`.
    """

    def __init__(
        self, a: Sequence[int], b: Sequence[int], places: Mapping[str, tuple[int, int]], rank: int, experts: int
    ) -> None:
        super().__init__()
        self.places = dict(places)
        self.A = nn.ParameterList(nn.Parameter(torch.empty(rank, width)) for width in a)
        self.B = nn.ParameterList(nn.Parameter(torch.zeros(experts, rank, out)) for out in b)
        for one in self.A:
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))


class LilyModule(ak.AdapterModule):
    """`base(x) + scale h sum_e p_e B_e` with `h = A x`, and p the mean of `softmax(router h)` over tokens."""

    def __init__(self, point: ak.InjectionPoint, rank: int, experts: int, scale: float, whole_batch: bool) -> None:
        super().__init__()
        self.scale, self.whole_batch = scale, whole_batch
        self.router = nn.Parameter(torch.empty(experts, rank))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        a, b = self.shared.places[self.at]
        h = nn.functional.linear(x, self.shared.A[a].to(x.dtype))
        shares = torch.softmax(nn.functional.linear(h, self.router.to(x.dtype)), dim=-1)
        if self.whole_batch or x.ndim == 1:
            shares = shares.reshape(-1, shares.shape[-1]).mean(0)
        elif x.ndim > 2:
            shares = shares.flatten(1, -2).mean(1)
        experts = self.shared.B[b].to(x.dtype)
        mixed = (shares @ experts.flatten(1)).unflatten(-1, experts.shape[1:])
        rows = h[:, None] if mixed.ndim == 3 and h.ndim == 2 else h
        if mixed.ndim == 3 and h.ndim > 3:
            rows = h.flatten(1, -2)
        return y + (rows @ mixed).reshape(y.shape).to(y.dtype) * self.scale


@dataclass(frozen=True)
class Lily(Ranked):
    """A for a few consecutive layers each, experts B for all layers, and a router that mixes these for each layer.

    Layers of one group share: those of equal `group` (or role, where it is empty) and equal shape. It does not merge:
    what is added is no linear function of x.

    Attributes:
        rank: Of each A and B.
        experts: Number of B.
        stride: How many consecutive layers of a group share an A.
        scale: Factor on the update.
        over: The router's shares are a mean over the tokens of each "sample"; or of the whole "batch", as PEFT computes
            them: what a row gets then depends on the other rows that have the adapter.
        group: What shares factors, beside the shape; empty for the role.
    """

    common: ClassVar[frozenset[str]] = frozenset({"rank", "experts", "stride"})
    forms: ClassVar[frozenset[str] | None] = frozenset({"linear", "linear_t"})
    rank: int = 32
    experts: int = 2
    stride: int = 1
    scale: float = 1.0
    over: str = "sample"
    group: str = ""

    def problems(self) -> list[str]:
        found = super().problems()
        if not 2 <= self.experts <= _MAX_EXPERTS:
            found.append(f"experts must be from 2 to {_MAX_EXPERTS}, not {self.experts!r}")
        if not 1 <= self.stride <= _MAX_STRIDE:
            found.append(f"stride must be from 1 to {_MAX_STRIDE}, not {self.stride!r}")
        if abs(self.scale) > _MAX_SCALE:
            found.append(f"scale must be within {_MAX_SCALE:g}, not {self.scale!r}")
        if self.over not in _OVER:
            found.append(f"over must be one of {', '.join(_OVER)}, not {self.over!r}.{did_you_mean(self.over, _OVER)}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.is_read:
            return "Lily's update is no linear function of an input, and the model reads this weight"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> LilyModule:
        return LilyModule(point, self.rank, self.experts, self.scale, self.over == "batch")

    def shared(self, points: Sequence[ak.InjectionPoint]) -> Factors:
        """All A and B: see the class."""
        a: list[int] = []
        b: list[int] = []
        groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        places: dict[str, tuple[int, int]] = {}
        for point in points:
            key = (self.at(point).group or point.role, point.shape)
            if key not in groups:
                groups[key] = [len(b), 0, 0]  # its B, its members, its last A
                b.append(point.out_features)
            group = groups[key]
            if group[1] % self.stride == 0:
                group[2] = len(a)
                a.append(point.in_features)
            group[1] += 1
            places[point.id] = (group[2], group[0])
        return Factors(a, b, places, self.rank, self.experts)
