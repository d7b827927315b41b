"""A model or pipeline with its backends: which components there are, and where their points lie."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import nn

from adapterkit.backend import Backend, Projection, Reach
from adapterkit.errors import AttachError, UnsupportedModelError, blaming
from adapterkit.layouts import Repeats
from adapterkit.mapping import offload_hooks
from adapterkit.mapping.checked import check_ids, checked_points, checked_reach, checked_repeats
from adapterkit.mapping.everywhere import block_points, norm_points
from adapterkit.mapping.fused import fused_points
from adapterkit.mapping.layers import call_plainly
from adapterkit.mapping.layouts import module_at
from adapterkit.mapping.projections import projection_points, with_sources
from adapterkit.mapping.roles import RoleMap
from adapterkit.mapping.structure import Picture, named_base_modules
from adapterkit.plugins.manager import get_plugin_manager, instance_of, owner
from adapterkit.plugins.matching import class_keys, foreign, peel
from adapterkit.points import AttentionPoint, InjectionPoint, OutputPoint, ParameterPoint, Points, TokensPoint


@dataclass(frozen=True)
class Component:
    """One mapped model.

    Attributes:
        name: `unet`, `text_encoder`, ...; for a model that stands alone its backend's word for it.
        root: The model itself, wrappers peeled off.
        backend: Maps it.
        backend_name: The backend's registered name.
        family: The class of the backend's table that the model was matched by, such as
            `transformers:LlamaPreTrainedModel`.
        plugin: The name of the plug-in that provides the backend.
    """

    name: str
    root: nn.Module
    backend: Backend
    backend_name: str
    family: str
    plugin: str = ""

    def blaming(self, call: str) -> AbstractContextManager[None]:
        """Names the plug-in where its backend fails in a call."""
        return blaming(f"backend {self.backend_name!r}", call, self.plugin)

    def points(self) -> list[InjectionPoint]:
        """What the backend says, with the points that every family has alike.

        Raises:
            PluginError: It does not keep to its contract.
        """
        with self.blaming("points()"):
            found = checked_points(self.backend.points(self.root, self.name), self.root, self.name)
            return [*found, *block_points(self.root, found)] if self.backend.whole_blocks else found

    def reach(self, point: InjectionPoint) -> Reach:
        """How adapters act at a point; errors as for `points`."""
        repeats = self._repeats(point)
        if isinstance(point, ParameterPoint) and point.layout.access == "any":
            return Reach(plain=call_plainly, repeats=repeats)
        whole = isinstance(point, OutputPoint) and point.is_block
        if not isinstance(point, AttentionPoint | TokensPoint) and not point.is_read and not whole:
            return _PLAIN[repeats]
        with self.blaming("reach()"):
            return replace(checked_reach(self.backend.reach(self.root, point), self.root, point), repeats=repeats)

    def _repeats(self, point: InjectionPoint) -> Repeats | None:
        try:  # a block of its own for each of thousands of points would be felt
            return checked_repeats(self.backend.repeats(self.root, point), point)
        except Exception:  # noqa: BLE001 - third-party code may raise anything; it is called again to be blamed
            with self.blaming("repeats()"):
                return checked_repeats(self.backend.repeats(self.root, point), point)


_PLAIN: Mapping[Repeats | None, Reach] = {repeats: Reach(repeats=repeats) for repeats in (None, *get_args(Repeats))}
"""Where nothing else is to be told: one for thousands of points."""


class _Known:
    """The points that were found, with the module trees in which they were. A copy of a model begins without."""

    def __init__(self) -> None:
        self.last: tuple[Picture, Points, Mapping[str, InjectionPoint]] | None = None
        self.paths: dict[str, tuple[str, ...]] = {}

    def __reduce__(self) -> tuple[type[_Known], tuple[()]]:
        return _Known, ()


@dataclass(frozen=True)
class MappedModel:
    """Every mapped component of what the user gave."""

    components: Mapping[str, Component]
    label: str
    roles: RoleMap | None = None
    known: _Known = field(default_factory=_Known, compare=False, repr=False)

    def points(self) -> Points:
        """All points, component by component, in model order; a module that is met twice counts once.

        They are found once, and again when the base's modules have changed: see `structure.Picture` for what is seen.

        Raises:
            PluginError: A backend does not keep to its contract, or gives two points one id.
        """
        return self._known()[0]

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
        roots, last = [one.root for one in self.components.values()], self.known.last
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
            key = (point.component, point.path)
            if key not in modules:
                modules[key] = self.module(point)
            place = (id(modules[key]), point.kind, point.span, point.in_span, *_slot_in_module(point))
            if place not in seen:
                seen.add(place)
                found.append(point)
        self._check_ids(found)
        return with_sources(found)

    def _all_points(self) -> list[InjectionPoint]:
        each = [one.points() for one in self.components.values()]
        roots = {name: one.root for name, one in self.components.items()}
        points = [*itertools.chain.from_iterable(each)]
        points += [*norm_points(points, roots), *fused_points(points)]
        if self.roles is None:
            return points
        return self.roles.apply(points, roots)

    def _check_ids(self, points: Sequence[InjectionPoint]) -> None:
        for name, component in self.components.items():
            with component.blaming("points()"):
                check_ids(points if len(self.components) == 1 else [p for p in points if p.component == name])

    def has_roots_of(self, other: MappedModel) -> bool:
        """Whether both are of the same models."""
        mine, theirs = ([id(one.root) for one in both.components.values()] for both in (self, other))
        return mine == theirs

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
        own = [one for one in module._parameters.values() if one is not None and one.is_floating_point()]
        around = (one for one in itertools.chain(module.parameters(), root.parameters()) if one.is_floating_point())
        if (first := own[0] if own else next(around, None)) is None:
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
        component = _component(None, model, backend)
        return MappedModel({component.name: component}, type(model).__name__, named)
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise UnsupportedModelError(
            f"{type(model).__name__} is neither a torch module nor a pipeline with components; "
            "pass the model itself, such as the loaded AutoModel or StableDiffusionPipeline"
        )
    found = [_claimed(name, part) for name, part in components.items() if isinstance(part, nn.Module)]
    mapped = {component.name: component for component in found if component is not None}
    if not mapped:
        raise UnsupportedModelError(
            f"no backend knows any component of {type(model).__name__} ({', '.join(components) or 'none'}); "
            "see: adapterkit backends"
        )
    return MappedModel(mapped, type(model).__name__, named)


def _claimed(name: str, part: nn.Module) -> Component | None:
    """A pipeline's component, or None where no backend claims it for a pipeline (a VAE, a safety checker)."""
    try:
        component = _component(name, part, None)
    except UnsupportedModelError:
        return None
    return component if component.backend.in_pipelines else None


def _component(name: str | None, root: nn.Module, backend: str | None) -> Component:
    manager = get_plugin_manager()
    root = _as_module(peel(root))
    if reason := _foreign(root):
        raise AttachError(f"{type(root).__name__} cannot be adapted: {reason}")
    spec = manager.backend(backend) if backend else manager.backend_for(root)
    instance = instance_of(spec, Backend)
    keys = class_keys(type(root))
    family = next((key for key in keys if key in spec.models), spec.name)
    if family == "torch:Module":  # the claim on what no family claims: the class itself tells more
        family = keys[0]
    return Component(name or instance.component_of(root), root, instance, spec.name, family, owner(spec))


def _as_module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is not a torch module")
    return model


def _foreign(root: nn.Module) -> str | None:
    """What another library has put around modules of `root`, and how to mend it; None where there is nothing."""
    first = {type(module): path for path, module in reversed([*named_base_modules(root)])}
    found = [(path, reason) for cls, path in first.items() if (reason := foreign(cls)) is not None]
    return f"at {found[-1][0] or 'its top'} {found[-1][1]}" if found else None
