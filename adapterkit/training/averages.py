"""The values that samples, figures and files have: an average of the steps, where there is one, or the last step's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.errors import MissingKeysError, ShapeMismatchError
from adapterkit.training.snapshots import Snapshot
from adapterkit.training.state import Trained

TRAINING = "training"
"""The file of a checkpoint that has the values which training goes on from, where those in use are others."""


class Averages:
    """Puts the values in use in the place of those that train, and back.

    The average is the optimizer's own, where it has one, or an exponential one, whose
    decay rises to `decay` over the first steps as min(decay, (1 + step) / (10 + step)).

    Args:
        trained: What is averaged. Its values now are the start of the exponential average.
        optimizer: Theirs.
        own: Whether it averages: its methods `train` and `eval` then exchange the values.
        decay: Of the exponential average; None for none.
    """

    def __init__(self, trained: Trained, optimizer: Any, *, own: bool, decay: float | None) -> None:
        self._trained, self._optimizer, self._own, self._decay = trained, optimizer, own, decay
        if own:
            optimizer.train()
        self._mean = {name: p.detach().clone() for name, p in trained.named.items()} if decay is not None else {}
        self._in_use = False

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Takes in the values after optimizer step `step`, from 1."""
        if self._decay is not None:
            weight = 1.0 - min(self._decay, (1 + step) / (10 + step))
            for name, parameter in self._trained.named.items():
                self._mean[name].lerp_(parameter, weight)

    def training_values(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint: the values that train, where they are not those in use."""
        if not self._own and not self._mean:
            return {}
        return {TRAINING: {name: p.detach().clone() for name, p in self._trained.named.items()}}

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Puts back the values that train.

        Raises:
            CheckpointError: The checkpoint has others.
        """
        if not self._own and not self._mean:
            return
        path = snapshot.folder / f"{TRAINING}.safetensors"
        values: Mapping[str, Tensor] = snapshot.tensors.get(TRAINING, {})
        for name, parameter in self._trained.named.items():
            if name not in values:
                raise MissingKeysError("the checkpoint has no value of it", path, name)
            if values[name].shape != parameter.shape:
                raise ShapeMismatchError(f"shape {tuple(values[name].shape)}, not {tuple(parameter.shape)}", path, name)
            parameter.copy_(values[name])

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the parameters have the values in use; afterwards they train on, bit for bit."""
        if self._in_use or (not self._own and not self._mean):
            yield
            return
        parameters = self._trained.named
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        self._in_use = True
        try:
            if self._own:
                self._optimizer.eval()
            _fill(parameters, self._mean)
            yield
        finally:
            _fill(parameters, kept)
            for group, values in zip(self._optimizer.param_groups, groups, strict=True):
                group.update(values)
            self._in_use = False


@torch.no_grad()
def _fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
