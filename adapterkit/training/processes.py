"""The processes that train together, and what they agree on."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from adapterkit.errors import ConfigError
from adapterkit.training.run import Run


def make_accelerator(run: Run) -> Accelerator:
    """What a run computes on.

    Raises:
        ConfigError: It cannot compute in the precision that the run asks for.
    """
    try:
        accelerator = Accelerator(mixed_precision=run.config.mixed_precision)
    except ValueError as error:
        raise ConfigError([f"mixed_precision: {error}"], "run") from error
    if run.config.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ConfigError([f"mixed_precision: fp16 needs a GPU, and this is a {accelerator.device}; try bf16"], "run")
    return accelerator


def mean_over_processes(accelerator: Accelerator, tensor: Any) -> Tensor:
    """The mean of what each process has; with one process, what it has."""
    reduced = accelerator.reduce(tensor, "mean")
    return reduced if isinstance(reduced, Tensor) else tensor


def any_process(accelerator: Accelerator, stop: bool) -> bool:
    """Whether any process was told to stop: all must save the same step."""
    if accelerator.num_processes == 1:
        return stop
    flag = torch.tensor(float(stop), device=accelerator.device)
    return bool(mean_over_processes(accelerator, flag) > 0)
