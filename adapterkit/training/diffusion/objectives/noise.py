"""Diffusion with a schedule of noise levels (Ho et al. 2020, arXiv:2006.11239): predict noise, velocity or picture."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from adapterkit.errors import UnsupportedModelError
from adapterkit.training.diffusion.objectives.objective import Objective
from adapterkit.training.sizes import Size

KINDS = ("epsilon", "v_prediction", "sample")


class NoiseObjective(Objective):
    """Times are the schedule's steps, [batch] of int64.

    Args:
        scheduler: The pipeline's; only its configuration is used.

    Raises:
        UnsupportedModelError: It predicts something else.
    """

    def __init__(self, scheduler: Any) -> None:
        diffusers: Any = importlib.import_module("diffusers")
        self.kind = scheduler.config.prediction_type
        if self.kind not in KINDS:
            raise UnsupportedModelError(
                f"the pipeline's scheduler predicts {self.kind!r}; this task trains {', '.join(map(repr, KINDS))}"
            )
        self.schedule: Any = diffusers.DDPMScheduler.from_config(scheduler.config)

    def times(self, u: Tensor, size: Size) -> Tensor:
        return (u * self.schedule.config.num_train_timesteps).long()

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
