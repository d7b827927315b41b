"""Modules that wait for the tensors of a file: no value is computed, and points that are alike share the building."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.engine.moulds import Mould
from adapterkit.points import InjectionPoint

_OVERRIDABLE = ("load_state_dict", "_load_from_state_dict", "set_extra_state", "state_dict", "_save_to_state_dict")
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")


@dataclass(frozen=True)
class _Slot:
    """Where a tensor belongs: the children to go through, its name there, and what it is."""

    path: tuple[str, ...]
    name: str
    is_parameter: bool
    requires_grad: bool


class Skeleton:
    """A module on the meta device, of which others are made.

    Attributes:
        module: What was built.
        expected: Name -> tensor of the right shape and dtype, for all that a file holds of it.
        lacks: Whether the module has tensors that no file holds, so that they must be computed.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        kept = module.state_dict(keep_vars=True)
        self.expected: Mapping[str, Tensor] = {name: tensor.detach() for name, tensor in kept.items()}
        held = {id(tensor) for tensor in kept.values()}
        self.lacks = any(id(tensor) not in held for tensor in itertools.chain(module.parameters(), module.buffers()))
        self._mould = Mould.of(module)
        self._slots = dict(_slots(module)) if all(map(_is_plain, module.modules())) else None

    def twin(self) -> nn.Module:
        """A module of its own, as a build would give it. It shares the empty tensors until it is filled."""
        return self._mould.cast()

    def fill(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors, which are those expected, into a twin or the module itself."""
        if self._slots is None:
            module.load_state_dict(tensors, strict=True, assign=True)
            return
        for key, tensor in tensors.items():
            slot = self._slots[key]
            owner: Any = module
            for child in slot.path:
                owner = owner._modules[child]
            if slot.is_parameter:
                owner._parameters[slot.name] = nn.Parameter(tensor, requires_grad=slot.requires_grad)
            else:
                owner._buffers[slot.name] = tensor


class Skeletons:
    """The modules of one config at its points.

    Args:
        config: The config.
        build: Makes the module at a point, on the current default device.
    """

    def __init__(self, config: AdapterConfig, build: Callable[[InjectionPoint], AdapterModule]) -> None:
        self.config, self._build, self._made = config, build, dict[Hashable, Skeleton]()
        self._says_alike: dict[type[AdapterConfig], bool] = {}

    def at(self, point: InjectionPoint, training: bool) -> tuple[AdapterModule, Skeleton]:
        """A module for a point, in its mode, and the skeleton that fills it; errors are those of `build`."""
        own = self.config.at(point)
        cls = type(own)
        if cls not in self._says_alike:
            self._says_alike[cls] = _says_alike(cls)
        alike = own.alike(point) if self._says_alike[cls] else None
        key = None if alike is None else (type(own), alike, training)
        skeleton = None if key is None else self._made.get(key)
        if skeleton is None:
            with torch.device("meta"):
                skeleton = Skeleton(self._build(point).train(training))
            if key is None or any(map(_holds_itself, skeleton.module.modules())):
                return skeleton.module, skeleton  # type: ignore[return-value]
            self._made[key] = skeleton
        module: Any = skeleton.twin()
        module.__dict__["at"] = point.id  # an attribute like any other; torch's way to set one takes 2 us
        return module, skeleton


def _says_alike(cls: type[AdapterConfig]) -> bool:
    """Whether `alike` is meant for the `build` that a config has: a subclass may build otherwise."""
    ancestry = cls.__mro__
    alike, build = (next(i for i, c in enumerate(ancestry) if name in vars(c)) for name in ("alike", "build"))
    return alike <= build


def _holds_itself(module: nn.Module) -> bool:
    """Whether an attribute is a method of a module, which a copy would share."""
    return any(isinstance(getattr(value, "__self__", None), nn.Module) for value in module.__dict__.values())


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's state is its tensors, and nothing else happens when they are loaded."""
    cls = type(module)
    own = all(getattr(cls, name) is getattr(nn.Module, name) for name in _OVERRIDABLE)
    return own and not any(module.__dict__.get(hooks) for hooks in _HOOKS)


def _slots(module: nn.Module, path: tuple[str, ...] = ()) -> Iterator[tuple[str, _Slot]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield ".".join((*path, name)), _Slot(path, name, True, parameter.requires_grad)
    for name in module._buffers:
        yield ".".join((*path, name)), _Slot(path, name, False, False)
    for name, child in module._modules.items():
        if child is not None:
            yield from _slots(child, (*path, name))
