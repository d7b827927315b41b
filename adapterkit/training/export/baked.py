"""The model of a run with the adapter in its weights, as its own library writes it, and read back."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.errors import CheckpointError, ConfigError, StateError
from adapterkit.handle.adapters import Adapters
from adapterkit.training.loading import dtype_of
from adapterkit.training.parts import inference
from adapterkit.training.task import Task

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


MODEL = "model"
"""Where in a run folder."""


def check_bakeable(adapters: Adapters, name: str) -> None:
    """Looks for what acts otherwise than by other weights, before anything is trained.

    Raises:
        ConfigError: Something does.
    """
    acting = {type(module).__name__ for module in adapters.modules(name).values() if not module.abilities.merge}
    if acting:
        told = f"{', '.join(sorted(acting))}: acts otherwise than by other weights, and cannot be baked"
        raise ConfigError([f"bake: {told}; set it to false, or train a type that merges, such as lora"], "run")


def write_baked(task: Task, model: object, adapters: Adapters, folder: Path) -> float:
    """Bakes what acts, and writes the model.

    Args:
        task: With its model.
        model: That.
        adapters: On it; they are gone afterwards.
        folder: Does not exist yet.

    Returns:
        How far what is read back is from what was trained: the largest difference of the probe, relative to it.

    Raises:
        NotMergeableError: The adapter acts otherwise than by other weights.
        CheckpointError: The folder is there, or cannot be written.
        StateError: What is read back computes something else. Nothing is written then.
    """
    if folder.exists() or folder.is_symlink():
        raise CheckpointError("exists already; name a new one, or remove it first", folder)
    if not folder.parent.is_dir():
        raise CheckpointError(f"the folder {folder.parent} does not exist; make it with mkdir -p", folder)
    with inference(model):
        trained = task.probe()
        adapters.bake()
        temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
        try:
            apart = _apart(task.write_model(temporary), trained, dtype_of(task.config.dtype))
            temporary.rename(folder)
        except OSError as error:
            raise CheckpointError(f"cannot be written: {error}", folder) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return apart


def _apart(found: Tensor, trained: Tensor | None, dtype: torch.dtype) -> float:
    """How far, where weights of a dtype are written: what an adapter adds to them is rounded to it."""
    assert trained is not None, "a task that writes models has a probe"
    error = float((found - trained).abs().max() / trained.abs().max().clamp(min=1e-12))
    if not error <= max(_TOLERANCE[dtype], _TOLERANCE[trained.dtype]):
        raise StateError(f"the model that is read back computes something else: {error:.1%} apart; nothing is written")
    return error
