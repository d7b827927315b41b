"""A model or pipeline with its backends: which components there are, and where their points lie."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adapterkit.backend import Projection, Reach
from adapterkit.errors import UnsupportedModelError
from adapterkit.mapping import offload_hooks
from adapterkit.mapping.checked import check_ids
from adapterkit.mapping.component import Component, alone, claimed, component_for
from adapterkit.mapping.layouts import module_at
from adapterkit.mapping.parts import in_order
from adapterkit.mapping.projections import projection_points, with_sources
from adapterkit.mapping.roles import RoleMap
from adapterkit.mapping.structure import Picture, named_base_modules
from adapterkit.mapping.ties import with_ties
from adapterkit.plugins.matching import peel
from adapterkit.points import AttentionPoint, InjectionPoint, ParameterPoint, Points


class _Known:
    """The points that were found, with the module trees in which they were. A copy of a model begins without."""

    def __init__(self) -> None:
        self.last: tuple[Picture, Points, Mapping[str, InjectionPoint]] | None = None
        self.paths: dict[str, tuple[str, ...]] = {}

    def __reduce__(self) -> tuple[type[_Known], tuple[()]]:
        return _Known, ()


@dataclass(frozen=True)
class MappedModel:
    """Every mapped component of what the user gave, and every part of a model that stands alone."""

    components: Mapping[str, Component]
    label: str
    roles: RoleMap | None = None
    known: _Known = field(default_factory=_Known, compare=False, repr=False)

    @property
    def models(self) -> Mapping[str, Component]:
        """Those that are no part of another."""
        return {name: one for name, one in self.components.items() if not one.is_part}

    @property
    def roots(self) -> list[nn.Module]:
        """Of these the models themselves."""
        return [one.root for one in self.models.values()]

    def of(self, model: str) -> Mapping[str, Component]:
        """A model, and the components that are parts of it."""
        return {name: one for name, one in self.components.items() if model in (name, one.model)}

    def points(self) -> Points:
        """All points, component by component, in model order; a module that is met twice counts once.

        They are found once, and again when the base's modules have changed: see `structure.Picture` for what is seen.

        Raises:
            PluginError: A backend does not keep to its contract, or gives two points one id.
        """
        return self._known()[0]

    def remarks(self) -> dict[str, str]:
        """Component and path, joined by a dot -> why there are no more points."""
        return {
            f"{name}.{path}" if path else name: why
            for name, one in self.components.items()
            for path, why in one.remarks().items()
        }

    def by_id(self) -> Mapping[str, InjectionPoint]:
        """The same points by their ids."""
        return self._known()[1]

    def paths(self, component: str) -> tuple[str, ...]:
        """Those of a component's modules, as they were when the points were asked for."""
        if component not in self.known.paths:
            root = self.components[component].root
            self.known.paths[component] = tuple(path for path, _ in named_base_modules(root))
        return self.known.paths[component]

    def _known(self) -> tuple[Points, Mapping[str, InjectionPoint]]:
        roots, last = self.roots, self.known.last
        if last is None or not last[0].shows(roots):
            picture, points = Picture(roots), Points(self._found())
            last = self.known.last = (picture, points, {point.id: point for point in points})
            self.known.paths = {}
        return last[1:]

    def _found(self) -> list[InjectionPoint]:
        found: list[InjectionPoint] = []
        seen: set[tuple[object, ...]] = set()
        modules: dict[tuple[str, str], nn.Module] = {}  # the experts of a layer are hundreds of points in one module
        for point in self._all_points():
            key = (point.model, point.path)
            if key not in modules:
                modules[key] = self.module(point)
            place = (id(modules[key]), point.kind, point.span, point.in_span, *_slot_in_module(point))
            if place not in seen:
                seen.add(place)
                found.append(point)
        self._check_ids(found)
        return with_ties(with_sources(found), modules)

    def _all_points(self) -> list[InjectionPoint]:
        each = {name: one.points() for name, one in self.components.items()}
        norms, fused = zip(*(self.components[name].everywhere(own) for name, own in each.items()), strict=True)
        points: list[InjectionPoint] = []
        for name, one in self.models.items():
            own = [*itertools.chain.from_iterable(each[part] for part in self.of(name))]
            points += in_order(own, one.root) if len(self.of(name)) > 1 else own
        points += itertools.chain(*norms, *fused)
        if self.roles is None:
            return points
        starts = {name: one.inside.path for name, one in self.components.items() if one.is_part}
        return self.roles.apply(points, {name: one.root for name, one in self.models.items()}, starts)

    def _check_ids(self, points: Sequence[InjectionPoint]) -> None:
        for name, component in self.components.items():
            with component.blaming("points()"):
                check_ids(points if len(self.components) == 1 else [p for p in points if p.component == name])

    def has_roots_of(self, other: MappedModel) -> bool:
        """Whether both are of the same models."""
        return [*map(id, self.roots)] == [*map(id, other.roots)]

    def root(self, point: InjectionPoint) -> nn.Module:
        """The model in which a point lies."""
        return self.components[point.component].root

    def module(self, point: InjectionPoint) -> nn.Module:
        """The module at a point."""
        return module_at(self.root(point), point.path)

    def reach(self, point: InjectionPoint) -> Reach:
        """How adapters act at a point; errors as for `points`."""
        return self.components[point.component].reach(point)

    def projections(self, point: AttentionPoint) -> tuple[Projection, Projection] | None:
        """The layers that make the keys and the values of an attention point; None where they are not known."""
        found = projection_points(point, self.by_id())
        if found is None:
            return None
        keys, values = (Projection(self.module(one), one, point.layout.kv_heads) for one in found)
        return keys, values

    def placement(self, point: InjectionPoint, module: nn.Module | None = None) -> tuple[torch.device, torch.dtype]:
        """Device and floating dtype of the weights around a point, where and as they are computed with.

        Args:
            point: The point.
            module: Its module, where that is at hand.
        """
        module, root = module or self.module(point), self.root(point)
        for one in module._parameters.values():  # no generator: asked for each of thousands of points
            if one is not None and one.is_floating_point():
                return offload_hooks.compute_device(root, point.path, one.device), one.dtype
        around = (one for one in itertools.chain(module.parameters(), root.parameters()) if one.is_floating_point())
        if (first := next(around, None)) is None:
            return torch.device("cpu"), torch.get_default_dtype()
        return offload_hooks.compute_device(root, point.path, first.device), first.dtype

    def fingerprint(
        self, points: Iterable[InjectionPoint], here: Iterable[InjectionPoint] | None = None
    ) -> dict[str, dict[str, Any]]:
        """What of the model an adapter at these points touches. No weights.

        Args:
            points: The adapter's.
            here: The model's, by whom they are at hand.

        Returns:
            Component -> `family`, the number of `points`, a digest of their ids and `shapes`, and how often the model
            has each of their `roles`: a model of more layers is another one, and a role that a later release adds to a
            family's table does not matter.
        """
        own: dict[str, list[InjectionPoint]] = {}
        for point in points:
            own.setdefault(point.component, []).append(point)
        counts = collections.Counter(
            (point.component, point.role) for point in (self.points() if here is None else here)
        )
        return {
            name: {
                "family": self.components[name].family,
                "points": len(here),
                "roles": {role: counts[name, role] for role in sorted({point.role for point in here})},
                "shapes": digest(here),
            }
            for name, here in own.items()
        }


def digest(points: Iterable[InjectionPoint]) -> str:
    """Of the points' ids and shapes."""
    # Sorted: releases of a library register a module's children in another order, and compute the same.
    shapes = json.dumps(sorted([point.id, list(point.shape)] for point in points))
    return hashlib.sha256(shapes.encode()).hexdigest()[:32]


def _slot_in_module(point: InjectionPoint) -> tuple[object, ...]:
    if isinstance(point, ParameterPoint):
        return (point.layout.parameter, point.layout.index)
    return (point.lengthens,)  # what changes a sequence, and what makes it longer


def map_model(model: object, backend: str | None = None, roles: Mapping[str, str] | None = None) -> MappedModel:
    """Finds the backend of a model, or of every component of a pipeline that has one.

    Args:
        model: A module, or anything with a `components` mapping (a diffusers pipeline).
        backend: A backend's name, to override the match by class.
        roles: Role -> glob of module paths, to say what layers are; see `adapterkit.mapping.roles`.

    Raises:
        UnsupportedModelError: No backend knows it.
        AttachError: Another library has replaced modules in it.
        ConfigError: `roles` is malformed.
    """
    model, named = peel(model), None if roles is None else RoleMap(roles)
    if isinstance(model, nn.Module):
        return MappedModel(alone(component_for(None, model, backend)), type(model).__name__, named)
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise UnsupportedModelError(
            f"{type(model).__name__} is neither a torch module nor a pipeline with components; "
            "pass the model itself, such as the loaded AutoModel or StableDiffusionPipeline"
        )
    found = [claimed(name, part) for name, part in components.items() if isinstance(part, nn.Module)]
    mapped = {component.name: component for component in found if component is not None}
    if not mapped:
        raise UnsupportedModelError(
            f"no backend knows any component of {type(model).__name__} ({', '.join(components) or 'none'}); "
            "see: adapterkit backends"
        )
    return MappedModel(mapped, type(model).__name__, named)
