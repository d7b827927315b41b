"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from adapterkit.training.config import RunConfig

_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate of optimizer step `step` (from 0): a linear rise over the warm-up, then the schedule's fall."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    rest = max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * _SHAPES[config.scheduler](min((step - config.warmup_steps) / rest, 1.0))
