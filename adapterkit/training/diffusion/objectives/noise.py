"""Diffusion with a schedule of noise levels (Ho et al. 2020, arXiv:2006.11239): predict noise, velocity or picture."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.errors import ConfigError, UnsupportedModelError
from adapterkit.training.diffusion.objectives.objective import Objective
from adapterkit.training.diffusion.objectives.times import Times

KINDS = ("epsilon", "v_prediction", "sample")
# What an error of the picture counts, by the signal-to-noise ratio and the bound on it.
_WEIGHTS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "min_snr": lambda ratio, bound: ratio.clamp(max=bound),
    "debiased": lambda ratio, bound: ratio.sqrt(),
}
# How many times an error of the picture the error of a prediction is.
_ERRORS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda ratio: ratio,
    "v_prediction": lambda ratio: ratio + 1,
    "sample": torch.ones_like,
}
_LEAST = 1e-8  # of the ratio: 0 / 0 where all is noise


class NoiseObjective(Objective):
    """Times are the schedule's steps, [batch] of int64.

    Args:
        scheduler: The pipeline's; only its configuration is used.
        times: Which are drawn how often.
        weighting: `none`; `min_snr` (Hang et al. 2023, arXiv:2303.09556); `debiased` (Yu et al., arXiv:2310.08442).
        bound: Gamma of `min_snr`.
        zero_terminal: Whether the last step is noise alone (Lin et al. 2023, arXiv:2305.08891, algorithm 1).

    Raises:
        UnsupportedModelError: It predicts something else.
        ConfigError: The weighting is none of these, or noise is predicted where there is nothing else.
    """

    def __init__(
        self,
        scheduler: Any,
        times: Times | None = None,
        weighting: str = "none",
        bound: float = 5.0,
        zero_terminal: bool = False,
    ) -> None:
        diffusers: Any = importlib.import_module("diffusers")
        self.kind = scheduler.config.prediction_type
        if self.kind not in KINDS:
            raise UnsupportedModelError(
                f"the pipeline's scheduler predicts {self.kind!r}; this task trains {', '.join(map(repr, KINDS))}"
            )
        if weighting != "none" and weighting not in _WEIGHTS:
            raise ConfigError(
                [f"options.loss_weighting: {weighting} is for flow matching; here choose {', '.join(_WEIGHTS)}"], "run"
            )
        if zero_terminal and self.kind == "epsilon":
            raise ConfigError(
                ["options.zero_terminal_snr: this model predicts noise, which says nothing where all is noise"], "run"
            )
        told = {"rescale_betas_zero_snr": True} if zero_terminal else {}
        self.schedule: Any = diffusers.DDPMScheduler.from_config(scheduler.config, **told)
        self.distribution = times or Times()
        self.weighting, self.bound = weighting, bound

    def times(self, u: Tensor, tokens: int) -> Tensor:
        steps = self.schedule.config.num_train_timesteps
        return (self.distribution(u) * steps).long().clamp(0, steps - 1)

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.schedule.add_noise(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Of the noise, the velocity, or the latents, whichever the scheduler predicts.

        With a = alphas_cumprod at the time the velocity is sqrt(a) noise - sqrt(1 - a) latents (Salimans and Ho 2022,
        arXiv:2202.00512, section 4).
        """
        if self.kind == "v_prediction":
            return self.schedule.get_velocity(latents, noise, times)
        return latents if self.kind == "sample" else noise

    def weights(self, times: Tensor) -> Tensor:
        """By the signal-to-noise ratio r = a / (1 - a): min(r, bound) or sqrt(r), over r, r + 1 or 1."""
        if self.weighting == "none":
            return torch.ones_like(times, dtype=torch.float32)
        kept = self.schedule.alphas_cumprod.to(times.device)[times]
        ratio = (kept / (1 - kept)).clamp(min=_LEAST)
        return _WEIGHTS[self.weighting](ratio, self.bound) / _ERRORS[self.kind](ratio)
