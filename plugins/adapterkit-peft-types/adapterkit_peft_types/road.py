"""RoAd: pairs of output features are rotated and stretched (Liao and Monz 2024, arXiv:2409.00119)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit.points import Kind

_SHARES = {1: 0.5, 2: 1, 4: 2}
"""Angles for each output, by variant."""


class RoAdModule(ak.AdapterModule):
    """`R (W x + b)`: features i and j of a pair become `a_i cos(t_i) y_i - a_i sin(t_i) y_j`, `... y_j + ... y_i`.

    Features of a group are paired with those half a group further. `theta` and `alpha` hold, group by group, a number
    for each pair (variant 1), for each feature (2), or for each feature's cosine, then for its sine (4).
    """

    def __init__(self, point: ak.InjectionPoint, variant: int, group: int) -> None:
        super().__init__()
        self.axis, self.variant, self.group = point.feature_axis, variant, group
        size = int(point.out_features * _SHARES[variant])
        self.theta, self.alpha = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.ones(size))

    def columns(self) -> tuple[Tensor, Tensor]:
        """`alpha cos(theta)` and `alpha sin(theta)` for every feature, [groups, 2, group / 2]."""
        theta, alpha = (each.view(-1, self._numbers, self.group // 2) for each in (self.theta, self.alpha))
        first, second = (slice(0, 2), slice(2, 4)) if self.variant == 4 else (slice(None), slice(None))
        return alpha[:, first] * theta[:, first].cos(), alpha[:, second] * theta[:, second].sin()

    @property
    def _numbers(self) -> int:
        return {1: 1, 2: 2, 4: 4}[self.variant]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.turned(base(x), self.axis)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turned(weight, 0), None if bias is None else self.turned(bias, 0)

    def turned(self, features: Tensor, axis: int) -> Tensor:
        """R times the features along an axis."""
        cosine, sine = (each.to(features.dtype) for each in self.columns())
        pairs = features.movedim(axis, -1).unflatten(-1, (-1, 2, self.group // 2))
        one, other = pairs.unbind(-2)
        turned = pairs * cosine + torch.stack((-other, one), -2) * sine
        return turned.flatten(-3).movedim(-1, axis)


@dataclass(frozen=True)
class RoAd(ak.AdapterConfig):
    """`R (W x + b)`, where R rotates pairs of features by learnt angles, and stretches them. No effect at first.

    Attributes:
        variant: 1: a pair has one angle and one factor; 2: each of its features; 4: each of the four numbers of R.
        group: Features in a group, even; it divides the point's outputs. None for the largest up to 64.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    forms: ClassVar[frozenset[str] | None] = frozenset({"linear", "linear_t", "conv"})
    targets: str = "attention"
    variant: int = 1
    group: int | None = None

    def problems(self) -> list[str]:
        found = []
        if self.variant not in _SHARES:
            found.append(f"variant must be 1, 2 or 4, not {self.variant!r}")
        if self.group is not None and (self.group < 2 or self.group % 2):
            found.append(f"group must be None or even and at least 2, not {self.group!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if reason := super().accepts(point):
            return reason
        if point.in_span is not None:
            return "RoAd rotates all that a projection gives, and this point has a part of its input; use LoRA"
        if point.cuts_groups:
            return "RoAd acts on whole grouped convolutions"
        features = point.out_features // point.layout.groups
        if features % self.group_at(point):
            return f"its {features} outputs (of a group) are no multiple of group {self.group_at(point)}"
        return None

    def group_at(self, point: ak.InjectionPoint) -> int:
        """Features in a group at a point."""
        features = point.out_features // point.layout.groups
        return self.group or next((size for size in range(64, 1, -2) if features % size == 0), 2)

    def alike(self, point: ak.InjectionPoint) -> tuple[Hashable, ...]:
        return (point.out_features, point.feature_axis, self.variant, self.group_at(point))

    def build(self, point: ak.InjectionPoint) -> RoAdModule:
        return RoAdModule(point, self.variant, self.group_at(point))
