"""Where a model's parameters are in its files, which may call them otherwise and hold several in one tensor."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from adapterkit.errors import ModelNotFoundError, did_you_mean
from adapterkit.tools.tensor_files import Tensors


@dataclass(frozen=True)
class Slot:
    """A parameter's place.

    Attributes:
        key: The tensor's name in the files.
        rows: The tensor's rows that are the parameter's, in order; None for all.
        transposed: Whether the tensor is the parameter's transpose.
    """

    key: str
    rows: slice | Sequence[int] | None = None
    transposed: bool = False

    def taken(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The parameter, from the tensor. A 1 x 1 convolution may be a matrix there, and the other way round."""
        tensor = tensor.mT if self.transposed else tensor
        own = tensor if self.rows is None else tensor[self.rows if isinstance(self.rows, slice) else [*self.rows]]
        return own.reshape(tuple(shape))

    def put(self, tensor: Tensor, value: Tensor) -> Tensor:
        """The tensor with another value in the parameter's place."""
        if self.rows is None:
            return (value.mT if self.transposed else value).reshape(tensor.shape).contiguous()
        whole = tensor.clone()
        rows = self.rows if isinstance(self.rows, slice) else [*self.rows]
        whole[rows] = value.reshape(whole[rows].shape)
        return whole


class Places(Protocol):
    """Where parameters are."""

    def __call__(self, parameter: str, /) -> Slot | None: ...


def by_name(names: Iterable[str], files: Tensors) -> Places:
    """Places of parameters that the files call as the model does, but for what may stand in front of all of them.

    Args:
        names: The model's parameters.
        files: Its files.
    """
    prefix, cut = _prefix([*names], files)

    def place(parameter: str) -> Slot | None:
        for key in (parameter, f"{prefix}{parameter[len(cut) :] if parameter.startswith(cut) else parameter}"):
            if key in files:
                return Slot(key)
        return None

    return place


def _prefix(names: Sequence[str], files: Tensors) -> tuple[str, str]:
    """What most parameters have in front in the files, and what they have there in the model instead."""
    present = set(files.names)
    if sum(name in present for name in names) * 2 >= len(names):
        return "", ""
    votes: collections.Counter[tuple[str, str]] = collections.Counter()
    by_end: dict[str, list[str]] = {}
    for key in present:
        by_end.setdefault(_end(key), []).append(key)
    for name in names:
        for key in by_end.get(_end(name), ()):
            if key.endswith(f".{name}"):
                votes[key[: -len(name)], ""] += 1
            elif name.endswith(f".{key}"):
                votes["", name[: -len(key)]] += 1
    return votes.most_common(1)[0][0] if votes else ("", "")


def _end(name: str) -> str:
    return ".".join(name.split(".")[-3:])


class StoredModel:
    """A model on the meta device whose values lie in files.

    Args:
        root: The model.
        files: Its files.
        place: Where its parameters are there.
        label: What errors call it.
    """

    def __init__(self, root: nn.Module, files: Tensors, place: Places, label: str) -> None:
        self.root, self.files, self._place, self._label = root, files, place, label
        self._names: dict[int, list[str]] = {}
        for path, module in root.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._names.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter -> its shape."""
        return {name: tuple(p.shape) for name, p in self.root.named_parameters(remove_duplicate=False)}

    def tied(self, parameter: str) -> list[str]:
        """The parameters that are one with this, it among them."""
        return self._names[id(self.root.get_parameter(parameter))]

    def slot(self, parameter: str) -> Slot:
        """Where a parameter is; one that is tied may be there under another of its names.

        Raises:
            ModelNotFoundError: It is not in the files.
        """
        for name in [parameter, *self.tied(parameter)]:
            if (slot := self._place(name)) is not None:
                return slot
        hint = did_you_mean(parameter, self.files.names)
        raise ModelNotFoundError(
            f"{self._label} holds no tensor for {parameter}.{hint} Its files call it otherwise; load the model with "
            "its own library and save it anew, or adapt it in memory"
        )

    def read(self, parameter: str) -> Tensor:
        """A parameter's value, in the dtype of the file."""
        slot, shape = self.slot(parameter), self.root.get_parameter(parameter).shape
        entry = self.files.entry(slot.key)
        try:
            return slot.taken(self.files.read(slot.key), shape)
        except RuntimeError as error:
            raise ModelNotFoundError(
                f"{self._label}: {slot.key!r} is {tuple(entry.shape)}, and {parameter} is {tuple(shape)}"
            ) from error

    def module(self, path: str) -> nn.Module:
        """A module alone, with the values of its own parameters."""
        found = copy.copy(self.root.get_submodule(path))
        found._parameters = {
            name: None if parameter is None else nn.Parameter(self.read(f"{path}.{name}" if path else name), False)
            for name, parameter in found._parameters.items()
        }
        return found


def is_whole(dtype: torch.dtype) -> bool:
    """Whether tensors of it hold numbers as they are, rather than a code for them."""
    return dtype.is_floating_point and dtype.itemsize > 1
