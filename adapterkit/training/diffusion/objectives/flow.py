"""Flow matching along straight lines from picture to noise (Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adapterkit.errors import ConfigError
from adapterkit.training.diffusion.objectives.objective import Objective
from adapterkit.training.diffusion.objectives.times import Times

_WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "cosmap": lambda times: 2 / (math.pi * (1 - 2 * times + 2 * times**2)),
    "sigma_sqrt": lambda times: times**-2.0,
}
_LEAST = 1e-3  # of a time: of no noise at all nothing can be learnt, and `sigma_sqrt` has no bound there


class FlowObjective(Objective):
    """Times are shares of noise, [batch] of float32, from 0 to 1.

    Args:
        times: Which are drawn how often, before they are shifted.
        shift: How far they are moved towards the noise, by the tokens of a picture.
        weighting: `none`; `cosmap` or `sigma_sqrt` (Esser et al. 2024, arXiv:2403.03206, section 3.1 and appendix).

    Raises:
        ConfigError: The weighting is none of these.
    """

    def __init__(self, times: Times, shift: Callable[[int], float], weighting: str = "none") -> None:
        if weighting not in _WEIGHTS:
            raise ConfigError(
                [f"options.loss_weighting: {weighting} is for schedules of noise; here choose {', '.join(_WEIGHTS)}"],
                "run",
            )
        self.distribution, self.shift, self.weighting = times, shift, weighting

    def times(self, u: Tensor, tokens: int) -> Tensor:
        return self.distribution(u, self.shift(tokens)).clamp(min=_LEAST)

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """(1 - t) latents + t noise."""
        share = _along(times, latents)
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The velocity: noise - latents."""
        return noise - latents

    def weights(self, times: Tensor) -> Tensor:
        return _WEIGHTS[self.weighting](times)


def _along(times: Tensor, latents: Tensor) -> Tensor:
    return times.view(-1, *(1,) * (latents.ndim - 1))
