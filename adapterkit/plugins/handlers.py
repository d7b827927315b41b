"""Which handler speaks for a layer: by its class, or by that of a tensor which it holds. Torch-free."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from adapterkit.errors import PluginConflictError
from adapterkit.plugins.manager import get_plugin_manager, instance_of, owner
from adapterkit.plugins.matching import class_keys
from adapterkit.specs import LayerSpec

if TYPE_CHECKING:
    from torch import nn

    from adapterkit.contract.layer import LayerHandler


def handler_of(module: nn.Module) -> LayerHandler | None:
    """The handler of the most derived of a layer's classes, or else of its parameters' and buffers'; None for none.

    Raises:
        PluginConflictError: Two handlers claim that class.
        PluginError: The handler cannot be made.
    """
    specs = get_plugin_manager().layers()
    if not specs:
        return None
    held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    for key in _keys(type(module), frozenset(map(type, held))):
        claims = [spec for spec in specs.values() if key in spec.classes]
        if len(claims) > 1:
            told = f"{key} is claimed by {claims[0]} and by {claims[1]}: uninstall one of them"
            raise PluginConflictError(told, owner(claims[1]))
        if claims:
            return _instance(claims[0])
    return None


@functools.lru_cache(maxsize=1024)
def _keys(cls: type, held: frozenset[type]) -> tuple[str, ...]:
    tensors = (key for one in sorted(held, key=str) for key in class_keys(one))
    return tuple(dict.fromkeys([*class_keys(cls), *tensors]))


@functools.lru_cache(maxsize=64)
def _instance(spec: LayerSpec) -> LayerHandler:
    from adapterkit.contract.layer import LayerHandler

    handler = instance_of(spec, LayerHandler)
    handler.plugin = owner(spec)
    return handler
