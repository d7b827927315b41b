"""Which times are drawn how often: the inverse of a distribution, so that a uniform number decides."""

from __future__ import annotations

import dataclasses
import functools
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
        low, high: Only times between these, as often as without, relative to one another.
    """

    kind: str = "uniform"
    mean: float = 0.0
    deviation: float = 1.0
    scale: float = 1.29
    low: float = 0.0
    high: float = 1.0

    def __call__(self, u: Tensor, shift: float = 1.0) -> Tensor:
        """The times of numbers that are uniform in [0, 1).

        Args:
            u: The numbers.
            shift: How far times are moved towards the noise.
        """
        if (self.low, self.high) != (0.0, 1.0):
            first, last = _numbers(self, shift)
            u = first + (last - first) * u
        return shifted(_KINDS[self.kind](self, u), shift)


@functools.lru_cache(maxsize=256)
def _numbers(times: Times, shift: float) -> tuple[float, float]:
    """Those whose times are the first and the last of the range, by bisection: the distributions are monotonous."""
    free = dataclasses.replace(times, low=0.0, high=1.0)
    falling = times.kind == "mode"
    return _number(free, shift, times.low, falling), _number(free, shift, times.high, falling)


def _number(times: Times, shift: float, wanted: float, falling: bool) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if (float(times(torch.tensor(middle, dtype=torch.float64), shift)) < wanted) != falling:
            low = middle
        else:
            high = middle
    return (low + high) / 2


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
