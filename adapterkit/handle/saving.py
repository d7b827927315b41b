"""An adapter on a model, as a checkpoint that a format can write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.adapter import AdapterConfig
from adapterkit.checkpoint import Checkpoint, Part
from adapterkit.errors import ConfigError, PluginError, StateError, shown
from adapterkit.handle.building import SHARED, Built, own_state, shared_of
from adapterkit.handle.sharding import gathered
from adapterkit.handle.state import Attached
from adapterkit.mapping.model import MappedModel
from adapterkit.plugins import get_plugin_manager
from adapterkit.points import Points
from adapterkit.specs import AdapterSpec


def to_checkpoint(attached: Attached, mapped: MappedModel, here: Points | None = None) -> Checkpoint:
    """One adapter with all that a file must know of it; the tensors are copies on the CPU.

    Args:
        attached: The adapter.
        mapped: Where it lies.
        here: The points there, by whom they are at hand.

    Raises:
        PluginError: The adapter's type is not registered, so no file could name it.
    """
    components = {point.component for point in attached.points.values()}
    return Checkpoint(
        parts=[_part(part) for part in attached.parts],
        base=mapped.fingerprint(attached.points.values(), here),
        backends={k: c.backend_name for k, c in mapped.components.items() if k in components},
        metadata=dict(attached.metadata),
    )


def unsavable(config: AdapterConfig) -> str | None:
    """Why no file could hold an adapter of this config; None where one can."""
    try:
        _spec(config)
        if not config.settings:  # types that are made of others look at theirs
            config.to_dict()
    except PluginError as error:
        return str(error)
    return None


def _spec(config: AdapterConfig) -> AdapterSpec:
    spec = get_plugin_manager().spec_of(type(config))
    if spec is None:
        raise PluginError(
            f"{type(config).__name__} is not a registered adapter type, so a file could not name it. "
            "Register it: get_plugin_manager().register(module) with an adapterkit_register_adapters hook"
        )
    return spec


def checked_names(names: object) -> list[str]:
    """What to save, one name or several.

    Raises:
        ConfigError: That is no list of names, each once.
    """
    if isinstance(names, str):
        return [names]
    if isinstance(names, bytes) or not isinstance(names, Iterable):
        raise ConfigError([f"expected a name or a list of names, not {shown(names)}"], "save()")
    listed: list[Any] = [*names]
    if not listed:
        raise ConfigError(["name at least one adapter"], "save()")
    if twice := [name for place, name in enumerate(listed) if name in listed[:place]]:
        raise ConfigError([f"{shown(twice[0])} is named twice"], "save()")
    return listed


def checked_metadata(metadata: object) -> Mapping[str, str]:
    """Text by name.

    Raises:
        ConfigError: It is something else.
    """
    given: Any = {} if metadata is None else metadata
    if not isinstance(given, Mapping) or not all(isinstance(text, str) for item in given.items() for text in item):
        raise ConfigError([f"metadata must map names to strings, not {shown(given)}"], "save()")
    return given


def checked_dtype(dtype: object) -> torch.dtype | None:
    """What tensors are to be written as.

    Raises:
        ConfigError: It is no dtype that has floating point.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise ConfigError([f"dtype must be a floating-point torch.dtype, not {shown(dtype)}"], "save()")


def _part(built: Built) -> Part:
    spec = _spec(built.config)
    config = built.config.to_dict()
    return Part(
        type=spec.name,
        settings=config.pop("settings", {}),
        config=config,
        tensors=_tensors(built),
        distribution=spec.origin.distribution if spec.origin else "",
        version=spec.origin.version if spec.origin else "",
    )


def _tensors(built: Built) -> dict[str, dict[str, Tensor]]:
    tensors = {key: _copies(own_state(module)) for key, module in built.modules.items()}
    shared = shared_of(built.modules)
    return tensors if shared is None else {SHARED: _copies(shared.state_dict()), **tensors}


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _whole(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def _whole(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise StateError(
            "the adapter's parameters have no values here: they are on the meta device (offloaded by a hook?)"
        )
    return gathered(tensor)
