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
    """All A [rank, in] and B [experts, rank, out] of an adapter, by name.

    Args:
        a, b: Name -> size: inputs of an A, outputs of a B.
        places: Point id -> the names of its A and its B.
        rank, experts: See `Lily`.
    """

    def __init__(
        self,
        a: Mapping[str, int],
        b: Mapping[str, int],
        places: Mapping[str, tuple[str, str]],
        rank: int,
        experts: int,
    ) -> None:
        super().__init__()
        self.places = dict(places)
        self.A = nn.ParameterDict({name: nn.Parameter(torch.empty(rank, width)) for name, width in a.items()})
        self.B = nn.ParameterDict({name: nn.Parameter(torch.zeros(experts, rank, out)) for name, out in b.items()})
        for one in self.A.values():
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

    Layers of one group share: those of equal role and shape. It does not merge: what is added is not linear in x.

    Attributes:
        rank: Of each A and B.
        experts: Number of B.
        stride: How many consecutive layers of a group share an A.
        scale: Factor on the update.
        over: The router's shares are a mean over the tokens of each "sample"; or of the whole "batch", as PEFT computes
            them: what a row gets then depends on the other rows that have the adapter.
        a: Name of the A of a point, which others have too; empty for one of every `stride` layers of a group.
        b: Name of the group, if it is not the role.
    """

    common: ClassVar[frozenset[str]] = frozenset({"rank", "experts", "stride"})
    forms: ClassVar[frozenset[str] | None] = frozenset({"linear", "linear_t"})
    rank: int = 32
    experts: int = 2
    stride: int = 1
    scale: float = 1.0
    over: str = "sample"
    a: str = ""
    b: str = ""

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

    def names(self, point: ak.InjectionPoint) -> tuple[str, str]:
        """What the A and the B of a point are called, where this is its own config."""
        second, layer = key_of(self.b or point.role, point.shape), point.tags.get("layer")
        shares = self.stride > 1 and isinstance(layer, int)
        slot = int(layer or 0) // self.stride if shares else point.id.partition("@")[2].replace(".", "-")
        return self.a or f"{second}-{slot}", second

    def shared(self, points: Sequence[ak.InjectionPoint]) -> Factors:
        """All A and B: see the class."""
        a: dict[str, int] = {}
        b: dict[str, int] = {}
        places: dict[str, tuple[str, str]] = {}
        for point in points:
            first, second = self.at(point).names(point)
            a[first], b[second] = point.in_features, point.out_features
            places[point.id] = (first, second)
        return Factors(a, b, places, self.rank, self.experts)


def key_of(group: str, shape: Sequence[int]) -> str:
    """What a group's B is called, for weights of a shape; a parameter's name has no dots."""
    return f"{group.replace('.', '-')}-{'x'.join(map(str, shape))}"
