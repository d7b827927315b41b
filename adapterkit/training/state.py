"""What is trained, by name, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.engine.slots import Slots, base_alone
from adapterkit.errors import CheckpointError, MissingKeysError, TrainingError
from adapterkit.training.snapshots import Snapshot, read_tensors, write_tensors

OPTIMIZER = "optimizer"
_GROUP = "group "


@dataclass(frozen=True)
class Trainable:
    """One parameter that trains.

    Attributes:
        name: The same in every run.
        parameter: Itself.
        rate: Its learning rate, which the schedule multiplies.
        decay: Its weight decay.
    """

    name: str
    parameter: nn.Parameter
    rate: float
    decay: float


class Trained:
    """Every parameter that the optimizer changes, under a name that is stable.

    Args:
        found: They.
        extra: Further modules, by file name.
    """

    def __init__(self, found: Iterable[Trainable], extra: Mapping[str, nn.Module]) -> None:
        self.extra = dict(extra)
        for module in self.extra.values():
            for _, parameter in own_parameters(module):
                parameter.requires_grad_(True)
        groups: dict[tuple[float, float], dict[int, Trainable]] = {}
        for one in found:
            groups.setdefault((one.rate, one.decay), {})[id(one.parameter)] = one
        self._groups = [list(group.values()) for group in groups.values()]
        self.named = {one.name: one.parameter for group in self._groups for one in group}

    @property
    def rates(self) -> list[float]:
        """The learning rates that there are, in the order of the groups."""
        return [group[0].rate for group in self._groups]

    def parameters(self) -> Iterator[nn.Parameter]:
        """In a fixed order."""
        return iter(self.named.values())

    def groups(self) -> list[dict[str, Any]]:
        """For an optimizer; `lr` is that of a schedule's factor 1."""
        return [
            {"params": [one.parameter for one in group], "lr": group[0].rate, "weight_decay": group[0].decay}
            for group in self._groups
        ]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the further modules, for a checkpoint or the run folder."""
        return {name: own_state(module) for name, module in self.extra.items()}

    def restore(self, snapshot: Snapshot, optimizer: OptimizerState) -> None:
        """Puts back what a checkpoint has of the further modules and the optimizer; the adapter has its values already.

        Raises:
            CheckpointError: The checkpoint was made for other parameters.
        """
        for name, module in self.extra.items():
            _fill(module, snapshot.tensors.get(name), snapshot.folder / f"{name}.safetensors")
        path = snapshot.folder / f"{OPTIMIZER}.safetensors"
        if OPTIMIZER not in snapshot.tensors:
            raise MissingKeysError("the checkpoint has no state of the optimizer", snapshot.folder)
        optimizer.restore(list(self.named), snapshot.tensors[OPTIMIZER], path)


class OptimizerState:
    """What an optimizer remembers, as named tensors: of each parameter, and what it has changed in its groups.

    Args:
        optimizer: As it was made, before its first step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._start = [dict(group) for group in optimizer.param_groups]

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """`parameter|key`, and `group 0|key`; a number is a tensor of 64 bits without a dimension, behind `#`.

        Args:
            names: Of the parameters, in the optimizer's order.

        Raises:
            TrainingError: It remembers something else than tensors and numbers.
        """
        state = self._optimizer.state_dict()["state"]
        found = {names[number]: values for number, values in state.items()}
        for number, (group, start) in enumerate(zip(self._optimizer.param_groups, self._start, strict=True)):
            changed = {key: value for key, value in group.items() if key != "params" and value is not start.get(key)}
            found[f"{_GROUP}{number}"] = {key: value for key, value in changed.items() if value != start.get(key)}
        return {f"{name}|{key}": tensor for name, values in found.items() for key, tensor in _flat(values)}

    def restore(self, names: Sequence[str], tensors: Mapping[str, Tensor], path: Path) -> None:
        """Puts back what `tensors` gave.

        Raises:
            CheckpointError: It is of other parameters, or of other groups.
        """
        places = {name: number for number, name in enumerate(names)}
        groups = self._optimizer.state_dict()["param_groups"]
        own = {f"{_GROUP}{number}": group for number, group in enumerate(groups)}
        state: dict[int, dict[str, Any]] = {}  # a parameter that no gradient has reached yet has none
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("|")
            if name not in places and name not in own:
                raise CheckpointError("no such parameter is trained here", path, key)
            _put(own[name] if name in own else state.setdefault(places[name], {}), part, tensor)
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, (bool, int, float)):
            kind = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float64
            yield f"{prefix}{key}#", torch.tensor(value, dtype=kind)
        elif value is not None:
            told = f"{prefix}{key}, of type {type(value).__name__}"
            raise TrainingError(f"the optimizer remembers {told}: a checkpoint can hold tensors and numbers only")


def _put(values: dict[str, Any], part: str, tensor: Tensor) -> None:
    *sections, key = part.split("/")
    for section in sections:
        values = values.setdefault(section, {})
    values[key.removesuffix("#")] = tensor.item() if key.endswith("#") else tensor


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
