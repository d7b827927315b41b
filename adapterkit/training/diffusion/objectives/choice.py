"""The objective that a scheduler's settings and the run's options mean."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from adapterkit.errors import ConfigError
from adapterkit.training.diffusion.objectives.flow import FlowObjective
from adapterkit.training.diffusion.objectives.noise import NoiseObjective
from adapterkit.training.diffusion.objectives.objective import Objective
from adapterkit.training.diffusion.objectives.times import Times
from adapterkit.training.diffusion.options import ObjectiveOptions


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers is one of flow matching."""
    return scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"


def ending_in_noise(scheduler: Any) -> Any:
    """A scheduler for samples of a model whose schedule ends in noise alone: it begins at the last step.

    Lin et al. 2023, arXiv:2305.08891, section 3.3.
    """
    diffusers: Any = importlib.import_module("diffusers")
    told = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return diffusers.DDIMScheduler.from_config(scheduler.config, **told)


def objective_of(scheduler: Any, options: ObjectiveOptions, shift: Callable[[int], float]) -> Objective:
    """Flow matching or a schedule of noise.

    Args:
        scheduler: The pipeline's.
        options: The run's.
        shift: What flow matching moves times by where the options do not say it, by the tokens of a picture.

    Raises:
        UnsupportedModelError: The scheduler predicts something else.
        ConfigError: The options do not fit it.
    """
    flow = is_flow(scheduler)
    times = Times(
        options.time_sampling or ("logit_normal" if flow else "uniform"),
        options.logit_mean,
        options.logit_std,
        options.mode_scale,
        *options.time_range,
    )
    if not flow:
        if options.time_shift is not None:
            raise ConfigError(["options.time_shift: is for flow matching, and this model has a schedule"], "run")
        return NoiseObjective(
            scheduler, times, options.loss_weighting, options.min_snr_gamma, options.zero_terminal_snr
        )
    if options.zero_terminal_snr:
        raise ConfigError(["options.zero_terminal_snr: flow matching always ends in noise; leave it out"], "run")
    told = options.time_shift
    return FlowObjective(times, shift if told is None else lambda tokens: told, options.loss_weighting)


def scheduled_shift(config: Mapping[str, Any], tokens: int) -> float:
    """How far a scheduler of flow matching moves times for a picture of so many tokens.

    Args:
        config: The scheduler's. With `use_dynamic_shifting` a line through two counts of tokens says it, or its
            logarithm.
        tokens: Of the picture.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    told = low + (tokens - few) * (high - low) / (many - few)
    return told if config.get("time_shift_type") == "linear" else math.exp(told)
