"""What stands in for a weight while adapters are merged, and how what it stands for comes back, bit for bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.backend import SITE
from adapterkit.engine.attach import CHILD, adapted_class, site_of
from adapterkit.errors import AttachError
from adapterkit.mapping import offload_hooks
from adapterkit.plugins.handlers import handler_of

_CONTENT = frozenset(("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"))
"""What of torch's own record of a module belongs to the layer that it is; the rest is hooks, and whether it trains."""


@dataclass
class Original(ABC):
    """What a stand-in stands for.

    Attributes:
        module: The module.
        path: Where it is, for errors.
        stand_ins: Name of a parameter -> what stands in for it.
        versions: How often each of those had been written to when it was put there.
    """

    module: nn.Module
    path: str
    stand_ins: dict[str, nn.Parameter]
    versions: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.versions = {name: parameter._version for name, parameter in self.stand_ins.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()  # a copy of a tensor counts anew

    @property
    @abstractmethod
    def originals(self) -> Mapping[str, nn.Parameter | None]:
        """Name -> what it was."""

    @property
    def pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter | None]]:
        """Every stand-in, with what it stands for."""
        return ((new, self.originals.get(name)) for name, new in self.stand_ins.items())

    def lost(self, stand_ins: Mapping[int, nn.Parameter | None]) -> str | None:
        """What `restore` would lose: what others have put there since.

        Args:
            stand_ins: By their ids all stand-ins of this merge, one of which a tie may have put here.
        """
        for name, own in self.stand_ins.items():
            present = self.module._parameters.get(name)
            if present is own:
                if own._version != self.versions[name]:
                    return f"the merged {name} of {self.path} was written to (load_state_dict, an optimizer?)"
            elif not (present is self.originals.get(name) or id(present) in stand_ins or _is_moved(own, present)):
                return f"the merged {name} of {self.path} was replaced by another one"
        return None

    def elsewhere(self) -> str | None:
        """Which stand-in has gone to the meta device, its numbers being with somebody who will bring them back."""
        present = {name: self.module._parameters.get(name) for name, own in self.stand_ins.items() if not own.is_meta}
        gone = [name for name, parameter in present.items() if parameter is not None and parameter.is_meta]
        return f"the merged {gone[0]} of {self.path} is offloaded, or on the meta device" if gone else None

    module: nn.Module

    def move(self, module: nn.Module) -> None:
        """Another module has taken the place of the one that it is of."""
        self.module = module
        self.stand_ins = {name: module.get_parameter(name) for name in self.stand_ins}
        self.__post_init__()

    @abstractmethod
    def recall(self, base: type[nn.Module], contents: dict[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
        """Class and content of the module as they are, made what they were."""

    @abstractmethod
    def restore(self) -> None:
        """Puts it back, on the device that the model has now."""


@dataclass
class OriginalParameter(Original):
    """A parameter that another one has taken the place of: of that alone, so one tied to it stays as it is."""

    name: str
    parameter: nn.Parameter | None
    resizes: bool
    """Whether the stand-in is of another size: a new head."""

    @property
    def originals(self) -> Mapping[str, nn.Parameter | None]:
        return {self.name: self.parameter}

    def recall(self, base: type[nn.Module], contents: dict[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
        original, present = self.parameter, contents["_parameters"].get(self.name)
        if original is not None and present is not None and _moved(original, present):
            original = nn.Parameter(original.to(present.device, present.dtype), original.requires_grad)
        return base, {**contents, "_parameters": {**contents["_parameters"], self.name: original}}

    def restore(self) -> None:
        original, present = self.parameter, self.module._parameters.get(self.name)
        if original is not None and present is not None:
            if _moved(original, present):
                original.data = original.data.to(present.device, present.dtype)
            if not self.resizes and _longer(original, present):
                original.data = torch.cat([original.data, present.data[len(original) :]])
        self.module._parameters[self.name] = original


@dataclass
class OriginalLayer(Original):
    """A layer that has become another one for a while: the same object with its hooks, of another class and content."""

    base: type[nn.Module]
    contents: dict[str, Any]

    @property
    def originals(self) -> Mapping[str, nn.Parameter | None]:
        return self.contents["_parameters"]

    def recall(self, base: type[nn.Module], contents: dict[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
        return self.base, {**contents, **self.contents}

    def restore(self) -> None:
        module, device = self.module, _device(self.module)
        _become(module, self.base, self.contents)
        if device is not None and _device(module) != device:
            module.to(device)


def as_it_was(originals: Sequence[Original], module: nn.Module) -> nn.Module:
    """What an adapted module was before stand-ins came: another object, whose forward can run in its place."""
    site = module.__dict__[SITE]
    base, contents = site.base, dict(module.__dict__)
    for original in originals:
        base, contents = original.recall(base, contents)
    cls = type(module) if base is site.base else adapted_class(base, site.read)
    was = cls.__new__(cls)
    was.__dict__.update(contents)
    return was


def replace_parameter(module: nn.Module, path: str, name: str, new: Tensor) -> OriginalParameter:
    """Puts another value into a parameter's place; a parameter as it is, where several modules are to have it."""
    old = module._parameters[name]
    stand_in = new if isinstance(new, nn.Parameter) else nn.Parameter(new)
    stand_in.requires_grad_(old is not None and old.requires_grad)
    module._parameters[name] = stand_in
    return OriginalParameter(module, path, {name: stand_in}, name, old, old is not None and old.shape != new.shape)


def replace_layer(module: nn.Module, path: str, plain: nn.Module) -> OriginalLayer:
    """Makes an adapted module what another one is. Nothing of its own is changed or copied."""
    site = site_of(module)
    if site is None:
        raise AttachError(f"{type(module).__name__} has no adapters")
    stand_ins = {name: parameter for name, parameter in plain._parameters.items() if parameter is not None}
    original = OriginalLayer(module, path, stand_ins, site.base, dict(module.__dict__))
    _become(module, type(plain), plain.__dict__)
    return original


def _become(module: nn.Module, base: type[nn.Module], contents: dict[str, Any]) -> None:
    own, site = module.__dict__, module.__dict__[SITE]
    kept_names = (*nn.Module().__dict__, *offload_hooks.RECORDS, SITE)
    kept = {name: own[name] for name in kept_names if name in own and name not in _CONTENT}
    children = {**contents["_modules"], CHILD: site.slots}
    own.clear()
    own.update({**contents, **kept, "_modules": children})
    site.base = base
    module.__class__ = adapted_class(base, site.read)
    site.handler = handler_of(module)


def _device(module: nn.Module) -> torch.device | None:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return next((tensor.device for tensor in tensors if tensor is not None), None)


def _is_moved(stand_in: Tensor, present: Tensor | None) -> bool:
    """Whether another parameter is there because the module has gone to another device, or has come back from one."""
    if present is None or present.shape != stand_in.shape:
        return False
    return present.device != stand_in.device or (present.dtype == stand_in.dtype and torch.equal(present, stand_in))


def _longer(original: Tensor, present: Tensor) -> bool:
    """Whether rows were added while it was merged."""
    return present.ndim > 0 and present.shape[1:] == original.shape[1:] and len(present) > len(original)


def _moved(original: Tensor, present: Tensor) -> bool:
    return original.device != present.device or original.dtype != present.dtype
