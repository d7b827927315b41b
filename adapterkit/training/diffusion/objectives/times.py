"""Which times are drawn how often: the inverse of a distribution, so that a uniform number decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Times:
    """Times from 0, the picture, to 1, noise (Esser et al. 2024, arXiv:2403.03206, section 3.1).

    Attributes:
        kind: `uniform`; `logit_normal`, equation 19; or `mode`, equation 20.
        mean, deviation: Of the normal distribution of the time's logit; a greater mean draws noisier times.
        scale: How much `mode` prefers the middle.
        low, high: The part of all times that they are drawn from.
    """

    kind: str = "uniform"
    mean: float = 0.0
    deviation: float = 1.0
    scale: float = 1.29
    low: float = 0.0
    high: float = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        """The times of numbers that are uniform in [0, 1)."""
        return self.low + (self.high - self.low) * _KINDS[self.kind](self, u)


def _uniform(times: Times, u: Tensor) -> Tensor:
    return u


def _logit_normal(times: Times, u: Tensor) -> Tensor:
    return torch.sigmoid(times.mean + times.deviation * torch.special.ndtri(u.double())).to(u.dtype)


def _mode(times: Times, u: Tensor) -> Tensor:
    return 1 - u - times.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


_KINDS: Mapping[str, Callable[[Times, Tensor], Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "mode": _mode,
}


def shifted(times: Tensor, shift: float) -> Tensor:
    """Times moved towards the noise, as more pixels need more of it: s t / (1 + (s - 1) t) (equation 23)."""
    return shift * times / (1 + (shift - 1) * times)
