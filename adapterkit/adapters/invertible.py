"""Invertible adapters: the embedded sequence is transformed, and the transform undone before the head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule, Base
from adapterkit.adapters.sublayer_net import ACTIVATIONS, linear, one_of
from adapterkit.points import InjectionPoint, Kind, TokensPoint, WeightPoint

_MAX_REDUCTION = 2**16
_MAX_EXPANSION = 64
_CLAMP = 5.0
_HEAD = "head"


class Net(nn.Module):
    """`up(f(down(h)))` from half of the features; `up` starts at zero."""

    def __init__(self, inputs: int, width: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.down, self.up = nn.Linear(inputs, width), nn.Linear(width, outputs)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], where h is."""
        return linear(self.up, ACTIVATIONS[self.activation](linear(self.down, h)))


class Coupling(nn.Module):
    """See `Invertible`. The first half of the features moves by F of the second, then the second by G of the first.

    Args:
        features: Width of the sequence, even.
        width: Of the hidden layers of F and G.
        activation: A key of `ACTIVATIONS`.
        affine: Whether a half is scaled too: F and G then give the scale's logarithm beside the shift.
    """

    def __init__(self, features: int, width: int, activation: str, affine: bool) -> None:
        super().__init__()
        half = features // 2
        self.affine = affine
        self.F, self.G = (Net(half, width, half * (2 if affine else 1), activation) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., features]."""
        x1, x2 = x.chunk(2, dim=-1)
        y1 = self._moved(x1, self.F(x2))
        return torch.cat([y1, self._moved(x2, self.G(y1))], dim=-1)

    def inverse(self, y: Tensor) -> Tensor:
        """`inverse(forward(x))` is x, up to rounding."""
        y1, y2 = y.chunk(2, dim=-1)
        x2 = self._moved_back(y2, self.G(y1))
        return torch.cat([self._moved_back(y1, self.F(x2)), x2], dim=-1)

    def _moved(self, half: Tensor, by: Tensor) -> Tensor:
        if not self.affine:
            return half + by
        log_scale, shift = by.chunk(2, dim=-1)
        return half * _bounded(log_scale).exp() + shift

    def _moved_back(self, half: Tensor, by: Tensor) -> Tensor:
        if not self.affine:
            return half - by
        log_scale, shift = by.chunk(2, dim=-1)
        return (half - shift) * (-_bounded(log_scale)).exp()


def _bounded(log_scale: Tensor) -> Tensor:
    """Within (-_CLAMP, _CLAMP), with slope 1 at 0 but for the factor 2 / pi."""
    return _CLAMP * 2 / math.pi * torch.atan(log_scale / _CLAMP)


class InvertedTokens(AdapterModule):
    """At `tokens`: the embedded sequence, transformed by what is `shared`."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.shared(base(x))


class InvertedHead(AdapterModule):
    """At `head`: the head of what the transform would give x from."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(self.shared.inverse(x))


@dataclass(frozen=True)
class Invertible(AdapterConfig):
    """Transforms the embedded sequence e, and undoes it before the head (Pfeiffer et al. 2020, arXiv:2005.00052).

        y1 = e1 + F(e2),  y2 = e2 + G(y1)                     additive (NICE: Dinh et al. 2014, arXiv:1410.8516)
        y1 = e1 * exp(c(s)) + t  with s, t = F(e2), ...       affine (Glow: Kingma & Dhariwal 2018, arXiv:1807.03039)

    where 1 and 2 are the halves of the features, F and G have one hidden layer, and c(s) = 10/pi atan(s / 5) keeps the
    scale bounded. Both points share F and G. Another weight than 1 mixes each point's output with the base's, so that
    the head no longer sees the inverse.

    Attributes:
        targets: "tokens head"; "tokens" alone where the model's head is no language model's. Narrow it to one component
            where several have tokens: "tokens@component=language".
        coupling: additive or affine.
        reduction: The hidden width is half of the features / reduction, rounded down, and at least 1.
        activation: One of `Bottleneck`'s.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"tokens", "weight"})
    common: ClassVar[frozenset[str]] = frozenset({"coupling", "reduction", "activation"})
    targets: str = "tokens head"
    coupling: str = "additive"
    reduction: float = 2
    activation: str = "relu"

    def problems(self) -> list[str]:
        found = one_of("coupling", self.coupling, ("additive", "affine"))
        found += one_of("activation", self.activation, ACTIVATIONS)
        if not 1 / _MAX_EXPANSION <= self.reduction <= _MAX_REDUCTION:
            found.append(f"reduction must be from 1/{_MAX_EXPANSION} to {_MAX_REDUCTION}, not {self.reduction!r}")
        return found

    def accepts(self, point: InjectionPoint) -> str | None:
        if isinstance(point, WeightPoint) and (point.role != _HEAD or not point.is_linear or point.is_read):
            return f"the inverse acts in front of a linear {_HEAD!r}"
        if point.lengthens:
            return "the sequence is made longer there, not embedded: use 'tokens'"
        if point.in_features % 2:
            return f"its {point.in_features} features cannot be halved"
        return super().accepts(point)

    def selection_problems(self, points: Sequence[InjectionPoint]) -> list[str]:
        if not any(isinstance(point, TokensPoint) for point in points):
            return ["targets must name 'tokens', which the head's inverse undoes"]
        widths = {_features(point): point.id for point in points}
        if len(widths) > 1:
            shown = ", ".join(f"{width} at {key}" for width, key in widths.items())
            return [f"targets must name points of one width, not of {shown}; 'tokens' alone leaves the head as it is"]
        return []

    def build(self, point: InjectionPoint) -> AdapterModule:
        return InvertedTokens() if isinstance(point, TokensPoint) else InvertedHead()

    def shared(self, points: Sequence[InjectionPoint]) -> Coupling:
        features = _features(points[0])
        width = max(1, int(features / 2 / self.reduction))
        return Coupling(features, width, self.activation, self.coupling == "affine")


def _features(point: InjectionPoint) -> int:
    return point.out_features if isinstance(point, TokensPoint) else point.in_features
