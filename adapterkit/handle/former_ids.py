"""Ids of files that were written when a point had another one: with other words for the same model, or with its path.

Three rules, each of which holds where it leaves exactly one point. A component that is not here is the one of its
family. A tower's points were its model's, with the tower in front of the site: `attn.q@clip.vision.3` is
`attn.q@vision.3`. A site that is a module's path means the weight there: `linear@model.layers.0.mlp.up` is
`mlp.up@language.0`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from adapterkit.checkpoint import Checkpoint, Part
from adapterkit.handle.building import SHARED
from adapterkit.mapping.component import Component
from adapterkit.points import InjectionPoint, NormPoint, ParameterPoint


def as_now(
    checkpoint: Checkpoint,
    here: Iterable[InjectionPoint],
    components: Mapping[str, Component] | None = None,
    *,
    pinned: bool = False,
) -> Checkpoint:
    """The same checkpoint with the ids that its points have here.

    Args:
        checkpoint: What a format has read.
        here: The model's points.
        components: The model's, where they are at hand.
        pinned: Whether the points are named one by one, since selectors may mean others now.

    Returns:
        The very checkpoint where its ids are those of today, or mean nothing here.
    """
    known, components = {point.id: point for point in here}, components or {}
    ids = {key for part in checkpoint.parts for key in (*part.tensors, *part.settings)}
    former = ids - known.keys() - {SHARED}
    if not former:
        return checkpoint
    meaning = _Former(known, checkpoint.base, components)
    if not (resolved := meaning.resolved(former, ids)):
        return checkpoint
    parts = [_renamed(part, resolved, pinned) for part in checkpoint.parts]
    return dataclasses.replace(checkpoint, parts=parts, base=meaning.base(checkpoint.base, resolved))


def _renamed(part: Part, ids: Mapping[str, str], pinned: bool) -> Part:
    if ids.keys().isdisjoint((*part.tensors, *part.settings)):
        return part
    tensors = {ids.get(key, key): own for key, own in part.tensors.items()}
    settings = {ids.get(key, key): own for key, own in part.settings.items()}
    if pinned:
        settings = {key: settings.get(key, {}) for key in tensors if key != SHARED}
    return dataclasses.replace(part, tensors=tensors, settings=settings)


class _Former:
    """What former ids mean.

    Args:
        known: The model's points by their ids.
        base: Of the file; see `Checkpoint`.
        components: The model's.
    """

    def __init__(
        self,
        known: Mapping[str, InjectionPoint],
        base: Mapping[str, Mapping[str, Any]],
        components: Mapping[str, Component],
    ) -> None:
        self._known, self._components = known, dict[str, str]()
        self._starts = {name: one.inside for name, one in components.items()}
        for name, made_for in base.items():
            same = [key for key, one in components.items() if one.family == made_for.get("family")]
            if name not in components and len(same) == 1:
                self._components[name] = same[0]
        self._towers = collections.defaultdict[str, list[str]](list)
        self._paths = collections.defaultdict[tuple[str, str], list[InjectionPoint]](list)
        for point in known.values():
            self._add(point)

    def _add(self, point: InjectionPoint) -> None:
        if "model" in point.tags:
            for site in {point.site, ".".join(word for word in (str(point.tags["tower"]), point.site) if word)}:
                self._towers[_id(point.role, point.model, site)].append(point.id)
        if isinstance(point, ParameterPoint):
            self._paths[point.model, point.path].append(point)
            if (inside := self._starts.get(point.component)) is not None and inside.path:
                self._paths[point.component, inside.inner(point.path)].append(point)

    def resolved(self, ids: Iterable[str], taken: Collection[str]) -> dict[str, str]:
        """Former id -> today's, of those that mean one point, and not that of another."""
        found = {key: one for key in sorted(ids) if (one := self._meant(key)) is not None}
        several = collections.Counter(found.values())
        return {key: one for key, one in found.items() if several[one] == 1 and one not in taken}

    def base(self, base: Mapping[str, Mapping[str, Any]], ids: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
        """What a file says of its base, with the names of today's components."""
        now: dict[str, dict[str, set[str]]] = {}
        for key, one in ids.items():
            role, _, place = key.partition("@")
            now.setdefault(place.partition(".")[0], {}).setdefault(role, set()).add(self._known[one].role)
        found: dict[str, Mapping[str, Any]] = {}
        for name, made_for in base.items():
            own = self._components.get(name, name)
            there = [point for point in self._known.values() if own in (point.component, point.model)]
            found[own] = _said_now(made_for, now[name], there) if name in now else made_for
        return found

    def _meant(self, key: str) -> str | None:
        role, _, place = key.partition("@")
        name, _, site = place.partition(".")
        component = self._components.get(name, name)
        now = _id(role, component, site)
        if now in self._known:
            return now
        if len(towers := self._towers.get(now, ())) == 1:
            return towers[0]
        return self._at(component, site, role)

    def _at(self, component: str, path: str, role: str) -> str | None:
        """The one weight at a path: of the same role, or the whole of what the module holds."""
        there = [point for point in self._paths.get((component, path), ()) if _is_norm(point) == (role == "norm")]
        same = [point for point in there if point.role == role]
        whole = same or [point for point in there if point.span is None and point.in_span is None]
        return whole[0].id if len(whole) == 1 else None


def _id(role: str, component: str, site: str) -> str:
    return f"{role}@{component}" + (f".{site}" if site else "")


def _is_norm(point: InjectionPoint) -> bool:
    return isinstance(point, NormPoint)


def _said_now(
    made_for: Mapping[str, Any], roles: Mapping[str, Collection[str]], there: Sequence[InjectionPoint]
) -> Mapping[str, Any]:
    """What a file says of a component, without what is said in other words now: counts, and a digest of ids.

    Args:
        made_for: What it says.
        roles: Former role -> those that its points have.
        there: The points of the model that the component was.
    """
    told = made_for.get("roles")
    kept = [role for role in told if roles.get(role, {role}) == {role}] if isinstance(told, Mapping) else []
    counts = collections.Counter(point.role for point in there)
    if told and any(counts[role] != told[role] for role in kept):
        return made_for  # a model of more layers: an error, or a note
    return {"family": made_for.get("family")}
