"""What training changes of the base itself: a head that trains too, the running means of its norms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.errors import MissingKeysError, ShapeMismatchError, UnexpectedKeysError
from adapterkit.training.snapshots import copies, read_tensors, write_tensors
from adapterkit.training.state import own_parameters, own_state


class BaseChanges:
    """The tensors of a base that a checkpoint of its adapters must hold as well.

    Those are the parameters that require grad when it is written, and the buffers that no longer have the values that
    they had when this was made.

    Args:
        model: The base, with its adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found = copies(self._buffers())

    def save(self, path: Path) -> None:
        """Writes them; nothing where there are none."""
        changed = {key: now for key, now in self._buffers().items() if not torch.equal(now.cpu(), self._found[key])}
        if tensors := copies({**self._parameters(), **changed}):
            write_tensors(path, tensors)
        else:
            path.unlink(missing_ok=True)  # of an earlier run in the same folder

    def restore(self, path: Path) -> None:
        """Puts back what `save` wrote there; buffers that had not changed then get the values that they had.

        Raises:
            CheckpointError: The file is damaged, of another base, or other parameters train here. Nothing is changed.
        """
        tensors = read_tensors(path) if path.exists() else {}
        own: dict[str, Tensor] = {**self._parameters(), **self._buffers()}
        wanted = {**self._found, **tensors}
        _check(own, wanted, path)
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(wanted[key])

    def _parameters(self) -> dict[str, Any]:
        return {key: parameter for key, parameter in own_parameters(self._model) if parameter.requires_grad}

    def _buffers(self) -> dict[str, Tensor]:
        parameters = {key for key, _ in self._model.named_parameters(remove_duplicate=False)}
        return {key: tensor for key, tensor in own_state(self._model).items() if key not in parameters}


def _check(own: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    if lacking := [key for key in own if key not in wanted]:
        raise MissingKeysError("trains here, and the checkpoint does not have it", path, lacking[0])
    if left := [key for key in wanted if key not in own]:
        raise UnexpectedKeysError("does not train here; let it require grad as it did", path, left[0])
    for key, tensor in own.items():
        if tensor.shape != wanted[key].shape:
            told = f"shape {tuple(wanted[key].shape)}, and here it is {tuple(tensor.shape)}"
            raise ShapeMismatchError(told, path, key)
