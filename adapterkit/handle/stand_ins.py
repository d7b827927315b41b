"""What stands in for a weight while adapters are merged, and how what it stands for comes back, bit for bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.backend import SITE
from adapterkit.engine.attach import CHILD, adapted_class, site_of
from adapterkit.errors import AttachError
from adapterkit.plugins.handlers import handler_of

_CONTENT = frozenset(("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"))
"""What of torch's own record of a module belongs to the layer that it is; the rest is hooks, and whether it trains."""


class Original(ABC):
    """What a stand-in stands for."""

    module: nn.Module

    @abstractmethod
    def restore(self) -> None:
        """Puts it back, on the device that the model has now."""


@dataclass
class OriginalParameter(Original):
    """A parameter that another one has taken the place of: of that alone, so one tied to it stays as it is."""

    module: nn.Module
    name: str
    parameter: nn.Parameter | None

    def restore(self) -> None:
        original, present = self.parameter, self.module._parameters[self.name]
        if original is not None and present is not None and _moved(original, present):
            original.data = original.data.to(present.device, present.dtype)
        self.module._parameters[self.name] = original


@dataclass
class OriginalLayer(Original):
    """A layer that has become another one for a while: the same object with its hooks, of another class and content."""

    module: nn.Module
    base: type[nn.Module]
    contents: dict[str, Any]

    def restore(self) -> None:
        module, device = self.module, _device(self.module)
        _become(module, self.base, self.contents)
        if device is not None and _device(module) != device:
            module.to(device)


def replace_parameter(module: nn.Module, name: str, new: Tensor) -> OriginalParameter:
    """Puts another value into a parameter's place."""
    old = module._parameters[name]
    wanted = old.requires_grad if old is not None else False
    module._parameters[name] = nn.Parameter(new, requires_grad=wanted)
    return OriginalParameter(module, name, old)


def replace_layer(module: nn.Module, plain: nn.Module) -> OriginalLayer:
    """Makes an adapted module what another one is. Nothing of its own is changed or copied."""
    site = site_of(module)
    if site is None:
        raise AttachError(f"{type(module).__name__} has no adapters")
    original = OriginalLayer(module, site.base, dict(module.__dict__))
    _become(module, type(plain), plain.__dict__)
    return original


def _become(module: nn.Module, base: type[nn.Module], contents: dict[str, Any]) -> None:
    own, site = module.__dict__, module.__dict__[SITE]
    kept = {name: own[name] for name in (*nn.Module().__dict__, SITE) if name in own and name not in _CONTENT}
    children = {**contents["_modules"], CHILD: site.slots}
    own.clear()
    own.update({**contents, **kept, "_modules": children})
    site.base = base
    module.__class__ = adapted_class(base, site.read)
    site.handler = handler_of(module)


def _device(module: nn.Module) -> torch.device | None:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return next((tensor.device for tensor in tensors if tensor is not None), None)


def _moved(original: Tensor, present: Tensor) -> bool:
    return original.device != present.device or original.dtype != present.dtype
