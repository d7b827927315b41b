"""From what a file says at single points to the parts of a checkpoint, and back."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from adapterkit.checkpoint import Checkpoint, Part
from adapterkit.contract.codec import Said
from adapterkit.errors import CheckpointError
from adapterkit.plugins.manager import get_plugin_manager

SHARED = "shared"
UNION = "union"


class Collected:
    """What was read so far, point by point.

    Args:
        where: What errors name.
    """

    def __init__(self, where: object = None) -> None:
        self._where = where
        self._said: dict[str, list[Said]] = {}

    def __bool__(self) -> bool:
        return bool(self._said)

    def add(self, point: str, said: Said | Sequence[Said]) -> None:
        """Adds what is said at a point.

        Args:
            point: Its id.
            said: One thing, or several, which act beside each other; or none.

        Raises:
            CheckpointError: The point has one of that type already.
        """
        for one in [said] if isinstance(said, Said) else said:
            own = self._said.setdefault(point, [])
            if any(one.type == other.type for other in own):
                raise CheckpointError(f"says {one.type} twice at {point}", self._where, point)
            own.append(one)

    def parts(self, shared: Mapping[str, Mapping[str, Tensor]] | None = None) -> list[Part]:
        """One for each type, and a union for each set of types that are at one point together.

        Args:
            shared: Type -> the tensors that all of its points share.
        """
        groups: dict[tuple[str, ...], dict[str, list[Said]]] = {}
        for point, own in self._said.items():
            groups.setdefault(tuple(one.type for one in own), {})[point] = own
        return [_part(types, group, shared or {}) for types, group in groups.items()]


def _part(
    types: tuple[str, ...], group: Mapping[str, Sequence[Said]], shared: Mapping[str, Mapping[str, Tensor]]
) -> Part:
    members = [_common({point: own[place].config for point, own in group.items()}) for place in range(len(types))]
    if len(types) == 1:
        config, settings = members[0]
        tensors = {point: own[0].tensors for point, own in group.items()}
        extra = {SHARED: shared[types[0]]} if types[0] in shared else {}
        return Part(types[0], config, {**extra, **tensors}, settings, *_provider(types[0]))
    parts = [
        {"type": name, "config": {**config, "settings": settings}}
        for name, (config, settings) in zip(types, members, strict=True)
    ]
    tensors = {
        point: {f"members.{i}.{name}": tensor for i, one in enumerate(own) for name, tensor in one.tensors.items()}
        for point, own in group.items()
    }
    both = {f"{i}.{key}": t for i, name in enumerate(types) for key, t in shared.get(name, {}).items()}
    return Part(UNION, {"parts": parts}, {**({SHARED: both} if both else {}), **tensors}, {}, *_provider(UNION))


def _provider(name: str) -> tuple[str, str]:
    return get_plugin_manager().provider("adapter", name) if name in get_plugin_manager().adapters() else ("", "")


_PLAIN = frozenset((int, float, bool, type(None)))
"""Types whose `repr` tells values apart as JSON does, in a tenth of the time: there are thousands of points."""


def _common(configs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What most points have, and for every point what is different there."""
    counts: dict[str, collections.Counter[str]] = {}
    values: dict[tuple[str, str], Any] = {}
    for config in configs.values():
        for name, value in config.items():
            text = repr(value) if type(value) in _PLAIN else json.dumps(value, sort_keys=True, default=str)
            counts.setdefault(name, collections.Counter())[text] += 1
            values[name, text] = value
    usual = {name: values[name, count.most_common(1)[0][0]] for name, count in counts.items()}
    own = {
        point: {name: value for name, value in config.items() if value != usual[name]}
        for point, config in configs.items()
    }
    return usual, own


def said_of(checkpoint: Checkpoint) -> dict[str, list[Said]]:
    """Point id -> what the adapter is there, each with its whole config: the reverse of `Collected.parts`.

    What points share is not in it: see `shared_of`. A union without gates is what its members are.
    """
    found: dict[str, list[Said]] = {}
    for part in checkpoint.parts:
        for point, tensors in part.tensors.items():
            if point != SHARED:
                found.setdefault(point, []).extend(_said(part, point, tensors))
    return found


def _said(part: Part, point: str, tensors: Mapping[str, Tensor]) -> Iterator[Said]:
    members = part.config.get("parts")
    if part.type != UNION or not members or part.config.get("gating"):
        yield Said(part.type, {**part.config, **part.settings.get(point, {})}, tensors)
        return
    for place, member in enumerate(members):
        prefix = f"members.{place}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if own or (not tensors and _shares_all(part, place)):
            config = {key: value for key, value in member["config"].items() if key != "settings"}
            yield Said(member["type"], {**config, **member["config"].get("settings", {}).get(point, {})}, own)


def _shares_all(part: Part, place: int) -> bool:
    """Whether a member of a union has all of its tensors in common: its points have none."""
    shared = any(name.startswith(f"{place}.") for name in part.tensors.get(SHARED, {}))
    own = (names for point, names in part.tensors.items() if point != SHARED)
    return shared and not any(name.startswith(f"members.{place}.") for names in own for name in names)


def shared_of(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Type -> the tensors that its points share."""
    found: dict[str, dict[str, Tensor]] = {}
    for part in checkpoint.parts:
        tensors, members = part.tensors.get(SHARED, {}), part.config.get("parts")
        if part.type != UNION or not members:
            found |= {part.type: dict(tensors)} if tensors else {}
            continue
        for name, tensor in tensors.items():
            place, _, own = name.partition(".")
            found.setdefault(members[int(place)]["type"], {})[own] = tensor
    return found
