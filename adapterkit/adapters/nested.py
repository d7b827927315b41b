"""Configs in configs, as files have them: a type's name, and its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterkit.adapter import AdapterConfig
from adapterkit.errors import ConfigError, PluginError, shown
from adapterkit.plugins import get_plugin_manager


def described(part: AdapterConfig) -> dict[str, Any]:
    """A config for a file.

    Raises:
        PluginError: Its type is not registered.
    """
    spec = get_plugin_manager().spec_of(type(part))
    if spec is None:
        raise PluginError(f"{type(part).__name__} is not a registered adapter type, so a file could not name it")
    return {"type": spec.name, "config": part.to_dict()}


def config_of(entry: object, where: str) -> AdapterConfig:
    """The inverse of `described`.

    Raises:
        ConfigError: It is no such thing; names `where`.
    """
    if isinstance(entry, AdapterConfig):
        return entry
    if not isinstance(entry, Mapping) or set(entry) != {"type", "config"} or not isinstance(entry["config"], Mapping):
        raise ConfigError([f"a part must have a type and a config, not {shown(entry)}"], where)
    return get_plugin_manager().adapter(str(entry["type"])).load().from_dict(entry["config"])
