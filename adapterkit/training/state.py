"""What is trained, by name, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.engine.slots import Slots, base_alone
from adapterkit.errors import CheckpointError, MissingKeysError
from adapterkit.training.snapshots import Snapshot, read_tensors, write_tensors

_OPTIMIZER = "optimizer"


class Trained:
    """Every parameter that the optimizer changes, under a name that is stable.

    Args:
        adapter: Name, parameter and factor on the learning rate of what trains of the adapter.
        extra: Further modules, by file name.
    """

    def __init__(self, adapter: Iterable[tuple[str, nn.Parameter, float]], extra: Mapping[str, nn.Module]) -> None:
        self.extra = dict(extra)
        for module in self.extra.values():
            for _, parameter in own_parameters(module):
                parameter.requires_grad_(True)
        groups: dict[float, dict[int, tuple[str, nn.Parameter]]] = {}
        for name, parameter, rate in adapter:
            groups.setdefault(rate, {})[id(parameter)] = (name, parameter)
        for key, module in self.extra.items():
            for name, parameter in own_parameters(module):
                groups.setdefault(1.0, {})[id(parameter)] = (f"{key}.{name}", parameter)
        self.rates = {factor: [p for _, p in group.values()] for factor, group in groups.items()}
        self.named = {name: p for group in groups.values() for name, p in group.values()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """In a fixed order."""
        return iter(self.named.values())

    def groups(self) -> list[dict[str, Any]]:
        """For a torch optimizer; each has the `factor` on its learning rate."""
        return [{"params": parameters, "factor": factor} for factor, parameters in self.rates.items()]

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds beside the adapter: the optimizer's tensors, and the further modules."""
        names = list(self.named)
        state = optimizer.state_dict()["state"]
        flat = {f"{names[i]}|{key}": value for i, values in state.items() for key, value in values.items()}
        return {_OPTIMIZER: flat, **{name: own_state(module) for name, module in self.extra.items()}}

    def restore(self, snapshot: Snapshot, optimizer: torch.optim.Optimizer) -> None:
        """Puts back what `tensors` gave; the adapter has its values already.

        Raises:
            CheckpointError: The checkpoint was made for other parameters.
        """
        for name, module in self.extra.items():
            _fill(module, snapshot.tensors.get(name), snapshot.folder / f"{name}.safetensors")
        path = snapshot.folder / f"{_OPTIMIZER}.safetensors"
        if _OPTIMIZER not in snapshot.tensors:
            raise MissingKeysError("the checkpoint has no state of the optimizer", snapshot.folder)
        state = self._optimizer_state(snapshot.tensors[_OPTIMIZER], path)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _optimizer_state(self, flat: Mapping[str, Tensor], path: Path) -> dict[int, dict[str, Tensor]]:
        numbers = {name: number for number, name in enumerate(self.named)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in flat.items():
            name, _, part = key.rpartition("|")
            if name not in numbers:
                raise CheckpointError("no such parameter is trained here", path, key)
            state.setdefault(numbers[name], {})[part] = tensor
        return state  # a parameter that no gradient has reached yet has none


def save_modules(modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Writes each module's tensors to `NAME.safetensors`."""
    for name, module in modules.items():
        write_tensors(folder / f"{name}.safetensors", own_state(module))


def load_modules(modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Reads what `save_modules` wrote.

    Raises:
        CheckpointError: A file is absent, damaged or of another shape.
    """
    for name, module in modules.items():
        path = folder / f"{name}.safetensors"
        _fill(module, read_tensors(path), path)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor] | None, path: Path) -> None:
    if tensors is None:
        raise MissingKeysError("the checkpoint lacks this file", path)
    try:
        with base_alone():
            module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(" ".join(str(error).split()), path) from error


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module of the base, without those of the adapters that act in it."""
    with base_alone():
        return module.state_dict()


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module of the base, without those of the adapters that act in it."""
    prefixes = _prefixes(module)
    return ((name, weight) for name, weight in module.named_parameters() if not name.startswith(prefixes))


def _prefixes(module: nn.Module) -> tuple[str, ...]:
    """How the names of the adapters' tensors in a module begin."""
    return tuple(f"{path}." for path, inner in module.named_modules(remove_duplicate=False) if isinstance(inner, Slots))
