"""From a checkpoint into an adapter that is there: every check is made before the first value is changed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterModule
from adapterkit.checkpoint import Checkpoint, Part
from adapterkit.contract.config import AdapterConfig
from adapterkit.engine.slots import is_held
from adapterkit.errors import AdapterMismatchError, NonFiniteError, StateError, printable
from adapterkit.handle.building import SHARED, Built, own_state, shared_of
from adapterkit.handle.fitting import Target, fitting
from adapterkit.handle.former_ids import as_now
from adapterkit.handle.loading import check_base, config_of, points_of
from adapterkit.handle.sharding import put_away
from adapterkit.handle.state import Attached
from adapterkit.kernels.finite import not_finite
from adapterkit.mapping.model import MappedModel
from adapterkit.points import Points

_PLACES = frozenset({"targets", "settings"})
"""The fields of a config that say where an adapter acts. The points themselves are compared instead."""


def refill(
    attached: Attached,
    checkpoint: Checkpoint,
    mapped: MappedModel,
    here: Points,
    strict: bool,
    source: object,
    *,
    finite: bool = False,
) -> list[str]:
    """Puts a checkpoint's values into the parameters and buffers of an adapter, which stay the objects that they are.

    Args:
        attached: The adapter.
        checkpoint: What a format has read.
        mapped: The model it is on.
        here: The model's points.
        strict: Whether configs and points must be equal. Otherwise points that only one of both has are left alone.
        source: Named in errors.
        finite: Whether who has read the tensors has refused NaN and infinity already.

    Returns:
        A sentence for everything that was left alone or looked past.

    Raises:
        CheckpointError: Anything does not fit.
        StateError: The adapter's own parameters have no values.
    """
    put_away(mapped.roots)
    target = Target(mapped, source, [], finite)
    checkpoint = as_now(checkpoint, here, mapped.components)
    configs = [config_of(part, source) for part in checkpoint.parts]
    _check_types(attached, configs, source)
    check_base(checkpoint, mapped, here, strict, source, target.notes)
    filled: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for own, part, config in zip(attached.parts, checkpoint.parts, configs, strict=True):
        points = points_of(part, {point.id: point for point in own.points}, strict, source, target.notes)
        _check_config(own.config, config, [point.id for point in points], strict, source, target.notes)
        filled += [*_values(own, part, [point.id for point in points], target)]
    with torch.no_grad():
        for module, values in filled:
            module.load_state_dict(values, strict=False)
            if isinstance(module, AdapterModule) and is_held(module):
                module.empty = False
    for note in target.notes:
        warnings.warn(printable(f"{source}: {note}"), stacklevel=4)
    return target.notes


def _check_types(attached: Attached, configs: list[AdapterConfig], source: object) -> None:
    if [type(config) for config in configs] != [type(config) for config in attached.configs]:
        theirs = " and ".join(type(config).__name__ for config in configs)
        told = f"holds {theirs}, and the adapter here is {attached.type_name}; load() makes an adapter of its own"
        raise AdapterMismatchError(told, source, "type")


def _check_config(
    mine: AdapterConfig, theirs: AdapterConfig, keys: list[str], strict: bool, source: object, notes: list[str]
) -> None:
    """Whether both configs say the same at these points: the same values under another config are another adapter."""
    for key in keys if mine.settings or theirs.settings else keys[:1]:
        if differing := _differing(theirs.at(key), mine.at(key)):
            told = f"another config ({differing})"
            if strict:
                hint = "load() makes an adapter of its own; strict=False takes the values all the same"
                raise AdapterMismatchError(f"{told}; {hint}", source, "config")
            notes.append(told)
            return


def _differing(theirs: AdapterConfig, mine: AdapterConfig) -> str:
    names = [one.name for one in dataclasses.fields(mine) if one.name not in _PLACES]
    pairs = [(name, getattr(theirs, name), getattr(mine, name)) for name in names]
    return "; ".join(f"{name} {was!r} there, {now!r} here" for name, was, now in pairs if was != now)


def _values(own: Built, part: Part, keys: list[str], target: Target) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Each module with what it gets."""
    shared = shared_of(own.modules)
    states: list[tuple[str, nn.Module, Mapping[str, Tensor]]] = []
    if shared is not None or SHARED in part.tensors:
        states.append((SHARED, shared or nn.Module(), {} if shared is None else shared.state_dict()))
    states += [(key, own.modules[key], own_state(own.modules[key])) for key in keys]
    for key, module, state in states:
        given = fitting(state, key, part.tensors.get(key, {}), (torch.device("cpu"), torch.float64), target)
        yield module, {name: _fitted(value, state[name], f"{key}/{name}", target) for name, value in given.items()}


def _fitted(value: Tensor, own: Any, key: str, target: Target) -> Tensor:
    """A value in the dtype, and in the shards, of what it is copied into."""
    if own.is_meta:
        raise StateError(f"{key} has no values that could be replaced: it is on the meta device (offloaded by a hook?)")
    cast = value.to(own.dtype)
    if cast.dtype != value.dtype and (bad := not_finite(cast)):
        raise NonFiniteError(f"{bad} of {cast.numel()} values are beyond {own.dtype}", target.source, key)
    return like(cast, own)


def like(value: Tensor, own: Any) -> Tensor:
    """A value, in the shards of what it is copied into."""
    if not hasattr(own, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor  # sharding has imported it already

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
