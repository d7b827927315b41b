"""One mapped model: the backend that claims its class, what that says of it, and the models inside."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import get_args

from torch import nn

from adapterkit.backend import Backend, Reach
from adapterkit.contract.layouts import Repeats
from adapterkit.errors import AttachError, UnsupportedModelError, blaming
from adapterkit.mapping.checked import checked_points, checked_reach, checked_repeats
from adapterkit.mapping.everywhere import block_points, norm_points
from adapterkit.mapping.fused import fused_points
from adapterkit.mapping.layers import call_plainly
from adapterkit.mapping.layouts import joined, module_at
from adapterkit.mapping.parts import ITSELF, Inside, checked_parts, in_order, is_inside, tower_of
from adapterkit.mapping.structure import named_base_modules
from adapterkit.plugins.manager import get_plugin_manager, instance_of, owner
from adapterkit.plugins.matching import class_keys, foreign, peel
from adapterkit.points import AttentionPoint, InjectionPoint, OutputPoint, ParameterPoint, Tag, TokensPoint


@dataclass(frozen=True)
class Component:
    """One mapped model.

    Attributes:
        name: `unet`, `text_encoder`, ...; for a model that stands alone its backend's word for it.
        root: The model itself, wrappers peeled off; of a part, the model that holds it.
        backend: Maps it.
        backend_name: The backend's registered name.
        family: The class of the backend's table that the model was matched by, such as
            `transformers:LlamaPreTrainedModel`.
        plugin: The name of the plug-in that provides the backend.
        inside: Where it is in `root`.
        model: The name of the component that `root` is.
        parts: The models inside that are mapped by backends of their own: components themselves where this one stands
            alone, and of the same name in a pipeline.
        around: The component that this one is a part of.
    """

    name: str
    root: nn.Module
    backend: Backend
    backend_name: str
    family: str
    plugin: str = ""
    inside: Inside = ITSELF
    model: str = ""
    parts: Sequence[Component] = ()
    around: Component | None = None

    @property
    def is_part(self) -> bool:
        """Whether it is inside another one."""
        return bool(self.model)

    @property
    def module(self) -> nn.Module:
        """What is mapped: `root`, or the part in it."""
        return module_at(self.root, self.inside.path)

    @property
    def within(self) -> Iterator[Component]:
        """The component, and those of all parts in it."""
        yield self
        for one in self.parts:
            yield from one.within

    def blaming(self, call: str) -> AbstractContextManager[None]:
        """Names the plug-in where its backend fails in a call."""
        return blaming(f"backend {self.backend_name!r}", call, self.plugin)

    def points(self) -> list[InjectionPoint]:
        """What the backend says, with the blocks; and what is in parts that are no components themselves.

        Raises:
            PluginError: It does not keep to its contract.
        """
        module, parts = self.module, [self.inside.inner(one.inside.path) for one in self.parts]
        with self.blaming("points()"):
            found = checked_points(self.backend.points(module, self.name), module, self.name)
            if parts:
                found = [point for point in found if not is_inside(point.path, parts)]
            if self.backend.whole_blocks:
                found += block_points(module, found)
        found = [point for point in found if self._withheld(point) is None]
        found = [self.inside.seen(point) for point in found]
        within = [point for one in self.parts if one.name == self.name for point in one.points()]
        return in_order([*found, *within], self.root) if within else found

    def remarks(self) -> dict[str, str]:
        """Path in the whole model -> why there are no more points; errors as for `points`."""
        with self.blaming("remarks()"):
            own = dict(self.backend.remarks(self.module))
        if self.around is not None:
            with self.blaming("points()"):
                points = self.backend.points(self.module, self.name)
            own |= {point.path: why for point in points if (why := self._withheld(point)) is not None}
        parts = [self.inside.inner(one.inside.path) for one in self.parts]
        found = {joined(self.inside.path, path): why for path, why in own.items() if not is_inside(path, parts)}
        for one in self.parts:
            if one.name == self.name:
                found |= one.remarks()
        return found

    def _withheld(self, point: InjectionPoint) -> str | None:
        """Why a point that the model has alone is none inside of the one around."""
        if self.around is None:
            return None
        with self.around.blaming("withheld()"):
            return self.around.backend.withheld(self.around.module, self.around.inside.inner(self.inside.path), point)

    def everywhere(self, points: Sequence[InjectionPoint]) -> tuple[list[InjectionPoint], list[InjectionPoint]]:
        """What every family has alike beside its points: norms, and fused layers as a whole."""
        beside = {id(one.module) for one in self.parts if one.name != self.name}
        norms = norm_points(points, self.name, self.module, self.inside.path, beside)
        return [*map(self._sited, norms)], [*map(self._sited, fused_points(points))]

    def _sited(self, point: InjectionPoint) -> InjectionPoint:
        """A point whose path was taken for its site, as the model alone has it."""
        if not self.inside.path:
            return point
        site = self.inside.inner(point.path) if point.site == point.path else point.site
        return replace(point, site=site, tags={**self.inside.tags, **point.tags})

    def reach(self, point: InjectionPoint) -> Reach:
        """How adapters act at a point; errors as for `points`."""
        for one in self.parts:
            if is_inside(point.path, [one.inside.path]):
                return one.reach(point)
        own = self.inside.alone(point)
        repeats = self._repeats(own)
        if isinstance(point, ParameterPoint) and point.layout.access == "any":
            return Reach(plain=call_plainly, repeats=repeats)
        whole = isinstance(point, OutputPoint) and point.is_block
        if not isinstance(point, AttentionPoint | TokensPoint) and not point.is_read and not whole:
            return _PLAIN[repeats]
        with self.blaming("reach()"):
            found = checked_reach(self.backend.reach(self.module, own), self.module, own)
        return replace(self.inside.reach(found), repeats=repeats)

    def _repeats(self, point: InjectionPoint) -> Repeats | None:
        module = self.module
        try:  # a block of its own for each of thousands of points would be felt
            return checked_repeats(self.backend.repeats(module, point), point)
        except Exception:  # noqa: BLE001 - third-party code may raise anything; it is called again to be blamed
            with self.blaming("repeats()"):
                return checked_repeats(self.backend.repeats(module, point), point)


_AROUND = "model"
"""What a model is called that has its name from one inside."""

_PLAIN: Mapping[Repeats | None, Reach] = {repeats: Reach(repeats=repeats) for repeats in (None, *get_args(Repeats))}
"""Where nothing else is to be told: one for thousands of points."""


def claimed(name: str, part: nn.Module) -> Component | None:
    """A pipeline's component, or None where no backend claims it for a pipeline (a VAE, a safety checker)."""
    try:
        component = component_for(name, part, None)
    except UnsupportedModelError:
        return None
    return _with_towers(component) if component.backend.joins_pipelines(component.module) else None


def component_for(name: str | None, root: nn.Module, backend: str | None) -> Component:
    """A model by the backend that claims its class, or by one that is named; without its parts yet.

    Raises:
        UnsupportedModelError: No backend knows it.
        AttachError: Another library has replaced modules in it.
    """
    root = _as_module(peel(root))
    if reason := _foreign(root):
        raise AttachError(f"{type(root).__name__} cannot be adapted: {reason}")
    return _matched(name, root, root, backend)


def _matched(name: str | None, root: nn.Module, module: nn.Module, backend: str | None = None) -> Component:
    """A component that maps a module of a model."""
    manager = get_plugin_manager()
    spec = manager.backend(backend) if backend else manager.backend_for(module)
    instance = instance_of(spec, Backend)
    keys = class_keys(type(module))
    family = next((key for key in keys if key in spec.models), spec.name)
    if family == "torch:Module":  # the claim on what no family claims: the class itself tells more
        family = keys[0]
    return Component(name or instance.component_of(module), root, instance, spec.name, family, owner(spec))


def _parts(one: Component) -> Iterator[tuple[str, str, Component]]:
    """Of every part its name, its path in the whole model, and a component for it that has its own name yet."""
    module = one.module
    with one.blaming("parts()"):
        parts = checked_parts(one.backend.parts(module), module)
    for name, inner in parts.items():
        yield name, joined(one.inside.path, inner), _matched(name, one.root, module.get_submodule(inner))


def alone(one: Component, known: Iterable[str] = ()) -> dict[str, Component]:
    """A model that stands alone, and all that is in it as components, whose points are as if they stood alone.

    Args:
        one: The model, or a part of one.
        known: Names of other components; none where it is the model.
    """
    parts = [*_parts(one)]
    names = [name for name, _, _ in parts]
    if one.name in names and not known:  # of a model and one inside, that inside keeps the word for both
        one = replace(one, name=_free(_AROUND, one.name, names))
    found, held = dict[str, Component](), list[Component]()
    for name, path, part in parts:
        own = _free(name, one.name, (*known, one.name))
        tags: dict[str, Tag] = {"model": one.model or one.name, "tower": tower_of(name)}
        part = replace(part, name=own, model=one.model or one.name, inside=Inside(path, tags), around=one)
        within = alone(part, (*known, one.name, *names, *found))
        held.append(next(iter(within.values())))
        found |= within
    return {one.name: replace(one, parts=held), **found}


def _free(name: str, around: str, taken: Collection[str]) -> str:
    return f"{around}_{name}" if name in taken else name


def _with_towers(one: Component) -> Component:
    """A model of a pipeline, whose parts have its name."""
    held: list[Component] = []
    for name, path, part in _parts(one):
        tower = tower_of(name)
        inside = Inside(path, {"tower": tower}, tower)
        part = replace(part, name=one.name, model=one.model or one.name, inside=inside, around=one)
        held.append(_with_towers(part))
    return replace(one, parts=held)


def _as_module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is not a torch module")
    return model


def _foreign(root: nn.Module) -> str | None:
    """What another library has put around modules of `root`, and how to mend it; None where there is nothing."""
    first = {type(module): path for path, module in reversed([*named_base_modules(root)])}
    found = [(path, reason) for cls, path in first.items() if (reason := foreign(cls)) is not None]
    return f"at {found[-1][0] or 'its top'} {found[-1][1]}" if found else None
