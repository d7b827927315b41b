"""The processes that train together, and what they agree on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor, nn

from adapterkit.errors import ConfigError
from adapterkit.training.config import RunConfig
from adapterkit.training.run import Run
from adapterkit.training.run_folder import RunFolder
from adapterkit.training.sharding import asked_by_launcher
from adapterkit.training.trackers import tracker_names

_PATIENCE = timedelta(hours=6)
"""How long processes wait for the first, which alone measures, draws and writes; who ends is noticed at once."""
_UNFIT = {
    "ACCELERATE_USE_MEGATRON_LM": "use_megatron_lm: it has models of its own; leave it out",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config: processes share data alone; leave it out",
    "ACCELERATE_USE_DEEPSPEED": "use_deepspeed: say --use_fsdp --fsdp_version 2 instead, or shard=true",
}
"""What launchers tell by environment variables, and is refused."""


def make_accelerator(run: Run) -> Accelerator:
    """What a run computes on.

    The run's keys decide: of its launcher an accelerator would take what the run does not say, as by how many forward
    passes a loss is divided.

    Raises:
        ConfigError: It cannot compute in the precision that the run asks for, or the launcher asks for what is not
            done here.
    """
    if unfit := [told for variable, told in _UNFIT.items() if _asked(variable)]:
        raise ConfigError(unfit, "accelerate launch")
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # or else processes of a CPU do not know of each other
            mixed_precision=run.config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
            log_with=tracker_names(run) or None,  # pyright: ignore[reportArgumentType] - it is a list of names
            project_dir=str(RunFolder(run).trackers),
        )
    except ValueError as error:
        raise ConfigError([f"mixed_precision: {error}"], "run") from error
    if run.config.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ConfigError([f"mixed_precision: fp16 needs a GPU, and this is a {accelerator.device}; try bf16"], "run")
    return accelerator


def ignored_of_launcher(config: RunConfig, processes: int) -> Iterator[str]:
    """What the launcher was told and the run's own keys decide otherwise: a sentence for each."""
    told = os.environ
    precision, compiler = told.get("ACCELERATE_MIXED_PRECISION"), told.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    passes = told.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if precision not in (None, config.mixed_precision):
        yield f"mixed_precision is {config.mixed_precision}, as in the run; the launcher says {precision}"
    if passes not in (None, "1", str(config.gradient_accumulation)):
        yield f"gradient_accumulation is {config.gradient_accumulation}, as in the run; the launcher says {passes}"
    if compiler != "no" and config.torch_compile is None:
        yield f"torch_compile is off, as in the run; the launcher says {compiler}"
    if processes == 1 and (config.shard or asked_by_launcher()):
        yield "there is one process, which has all of the base: nothing is spread"


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def mean_over_processes(accelerator: Accelerator, tensor: Any) -> Tensor:
    """The mean of what each process has; with one process, what it has."""
    reduced = accelerator.reduce(tensor, "mean")
    return reduced if isinstance(reduced, Tensor) else tensor


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Gives all processes the mean of their gradients, in one message.

    A gradient that some have and others lack, as where a batch has no caption, is zero in those.
    """
    if accelerator.num_processes == 1:
        return
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    mean = mean_over_processes(accelerator, torch.cat([*(grad.float().flatten() for grad in own), there]))
    *parts, share = mean.split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, part, had in zip(parameters, parts, share.tolist(), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype) if had else None


def any_process(accelerator: Accelerator, stop: bool) -> bool:
    """Whether any process was told to stop: all must save the same step."""
    if accelerator.num_processes == 1:
        return stop
    flag = torch.tensor(float(stop), device=accelerator.device)
    return bool(mean_over_processes(accelerator, flag) > 0)


def peak_memory(accelerator: Accelerator) -> int:
    """Bytes that were in use at most: of the GPU, or of the process where there is none; 0 where no one knows."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
