"""In and out of a module tree.

An adapted module stays where it is: same path, same parameters, still an instance of its class. Its class becomes a
dynamic subclass whose forward asks the `Site` kept in the module's `__dict__`; the adapter modules are registered below
the module, so that `.to`, sharding and `train()` reach them. Detaching restores class, `__dict__` and children.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from adapterkit.adapter import AdapterModule
from adapterkit.backend import CHILD, SITE, Reach
from adapterkit.engine.class_cache import made_once
from adapterkit.engine.hook_registry import release, unhook
from adapterkit.engine.hooks import Attends, Counts, End, Reads, Tap, Whole
from adapterkit.engine.several_handles import SiteStack
from adapterkit.engine.site import Removable, Site
from adapterkit.engine.slots import Slot, Slots
from adapterkit.engine.switch import Switch
from adapterkit.mapping import offload_hooks
from adapterkit.plugins.handlers import handler_of
from adapterkit.points import AttentionPoint, InjectionPoint, OutputPoint, ParameterPoint, TokensPoint


@made_once
def adapted_class(base: type[nn.Module], read: frozenset[str] = frozenset()) -> type[nn.Module]:
    """The subclass of `base` whose instances ask their site. It bears its base's name.

    Args:
        base: The module's own class.
        read: Parameters that the model reads: reading one asks the site too.
    """

    class Adapted(base):  # type: ignore[misc,valid-type]
        @functools.wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self, Adapted):  # of another class by now, and a hook (accelerate's) still holds this
                return type(self).forward(self, *args, **kwargs)
            site = self.__dict__.get(SITE)
            if site is None:  # detached by force, and another library has made a class of this one
                return super().forward(*args, **kwargs)
            return site.call(self, super().forward, args, kwargs)

        def to(self, *args: Any, **kwargs: Any) -> Any:
            return _moved(self, super().to, args, kwargs)

        def __reduce_ex__(self, protocol: Any, /) -> tuple[Any, ...]:
            # A dynamic class cannot be pickled by reference: rebuild it from its base.
            state = self.__getstate__() if hasattr(base, "__getstate__") else self.__dict__
            return _empty_instance, (base, read), state

    for name in read:
        setattr(Adapted, name, _reading(name))
    if issubclass(base, nn.Sequential):  # its forward, and its users, go through its children
        for name, method in (("__iter__", _iterate), ("__len__", _length)):
            setattr(Adapted, name, method)
    Adapted.__name__, Adapted.__qualname__, Adapted.__module__ = base.__name__, base.__qualname__, base.__module__
    Adapted.__doc__ = base.__doc__
    return Adapted


@made_once
def _beneath(base: type[nn.Module]) -> Callable[..., Any]:
    """What hooks around a module's forward are given in place of the module's own: that of whatever class it has."""

    @functools.wraps(base.forward)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)

    return forward


def _moved(module: nn.Module, to: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """`module.to`. A cast of this layer alone, by what is around its forward, is none of its adapters'."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
    if dtype is None or not offload_hooks.being_hooked(module):
        return to(*args, **kwargs)
    for site in sites_of(module):
        site.switch.exchanging = True
    slots = module._modules.pop(CHILD, None)
    try:
        to(*args, **kwargs)
    finally:
        if slots is not None:
            module._modules[CHILD] = slots
    if device is not None and slots is not None:
        slots.to(device)
    return module


def _reading(name: str) -> property:
    def read(module: nn.Module) -> Any:
        site = module.__dict__.get(SITE)
        if site is None:  # detached, and another library has made a class of this one
            return module.__getattr__(name)
        return site.parameter(module, name)

    return property(read, lambda module, value: module.__dict__.update({name: value}))


def _iterate(module: nn.Module) -> Iterator[nn.Module]:
    return iter([child for name, child in module._modules.items() if name != CHILD and child is not None])


def _length(module: nn.Module) -> int:
    return len(module._modules) - (CHILD in module._modules)


def _empty_instance(base: type[nn.Module], read: frozenset[str]) -> nn.Module:
    cls = adapted_class(base, read)
    return cls.__new__(cls)


class Spot(NamedTuple):
    """Where an adapter is put: a point, its model and module, what is put there, and how that acts."""

    point: InjectionPoint
    root: nn.Module
    module: nn.Module
    adapter: AdapterModule
    reach: Reach


def site_of(module: nn.Module, switch: Switch | None = None) -> Site | None:
    """The site of an adapted module: of the handles with this switch, or the innermost."""
    return next((site for site in sites_of(module) if switch is None or site.switch is switch), None)


def sites_of(module: nn.Module) -> tuple[Site, ...]:
    """The sites of an adapted module, one for each state that has adapters there, the innermost first."""
    found = module.__dict__.get(SITE)
    return found.sites if isinstance(found, SiteStack) else () if found is None else (found,)


def _put(module: nn.Module, sites: Sequence[Site], *, adapted: bool = True) -> None:
    """Makes these the sites of a module; without any it is what it was.

    Args:
        module: The module.
        sites: The innermost first.
        adapted: Whether the module's class is ours to set.
    """
    before = sites_of(module)
    for site in sites if max(len(before), len(sites)) > 1 else ():
        for name in [name for name, one in site.slots._modules.items() if isinstance(one, Slots)]:
            del site.slots._modules[name]
    if not sites:
        first = before[0]
        del module.__dict__[SITE]
        del module._modules[CHILD]
        offload_hooks.exchange_forward(module, first.own_forward or MethodType(first.base.forward, module))
        if adapted:
            module.__class__ = first.base
        return
    first, *others = sites
    plain = MethodType(_beneath(first.base), module)
    own = before[0].own_forward if before else offload_hooks.exchange_forward(module, plain)
    for site in sites:
        site.own_forward = own
    for place, site in enumerate(others, 2):
        first.slots._modules[f"handle_{place}"] = site.slots
    stack = first if not others else SiteStack(sites)
    module.__dict__[SITE] = stack
    module._modules[CHILD] = first.slots
    if adapted:
        module.__class__ = adapted_class(stack.base, stack.read)


def refusal(root: nn.Module, path: str, module: nn.Module) -> str | None:
    """Why the module at a path cannot be adapted in place, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted or traced; attach adapters before that"
    first = next((one for one in module._parameters.values() if one is not None), None)  # the usual case, and quick
    first = next(module.parameters(), None) if first is None else first
    if hasattr(first, "device_mesh"):  # a DTensor
        return "its weights are sharded; add adapters before fully_shard, which then shards them too"
    if SITE in module.__dict__:
        return None if is_adapted(module) else "its class was changed after an adapter was attached"
    if offload_hooks.is_hooked(module) and not offload_hooks.held_forwards(module):
        return "its forward was replaced on the instance by a function that hides its own; attach adapters before that"
    if first is not None and (reason := offload_hooks.takes_along(root, path, first)):
        return reason
    if isinstance(module._modules.get(CHILD), nn.Module):
        return f"it already has a child called {CHILD!r}"
    return None


def attach(spot: Spot, name: str, switch: Switch) -> None:
    """Puts one adapter at one point. All checks have been made; this cannot fail half way."""
    point, module, reach = spot.point, spot.module, spot.reach
    sites = sites_of(module)
    site = next((one for one in sites if one.switch is switch), None)
    if fresh := site is None:
        switch.exchanging = switch.exchanging or offload_hooks.exchanges_data(module)
        base = sites[0].base if sites else type(module)
        site = Site(switch, base, handler=handler_of(module), training=module.training)
        sites = (*sites, site)
    key = _key(point)
    slot = site.slots._modules.get(key)
    if not isinstance(slot, Slot):
        slot = Slot(point, reach.repeats, hides=reach.hides, training=module.training)
        site.slots._modules[key] = slot
        if fresh or slot.parameters_read:
            _put(module, sites)
        _connect(spot.root, module, site, slot, reach)
        site.plain = reach.plain or site.plain
        site.lengthening = reach.lengthening or site.lengthening
    site.projections = reach.projections or site.projections
    slot._modules[name] = spot.adapter
    unhook(spot.adapter, site)
    site.changed()


def _connect(root: nn.Module, module: nn.Module, site: Site, slot: Slot, reach: Reach) -> None:
    point = slot.point
    if isinstance(point, OutputPoint):
        layout = point.layout
        norms = (layout.norm_in, layout.norm_out)
        first, second = (None if path is None else root.get_submodule(path) for path in norms)
        site.norms[point.id] = (first, second)
        if layout.whole:
            return
        residual = root.get_submodule(layout.residual)
        site.hooks[point.id] = [residual.register_forward_pre_hook(Tap(site, point.id), with_kwargs=True)]
    if isinstance(point, TokensPoint):
        layout = point.layout
        site.hooks[point.id] = []
        if layout.until is not None:
            end = root.get_submodule(layout.until)
            site.hooks[point.id].append(end.register_forward_pre_hook(End(site, point.id)))
        if layout.whole is not None:
            whole = root.get_submodule(layout.whole)
            site.hooks[point.id].append(whole.register_forward_hook(Whole(site, point.id)))
        for path, reading in reach.reading.items():
            owner, _, method = path.rpartition(".")
            site.hooks[point.id].append(Reads(site, point.id, root.get_submodule(owner), method, reading))
        site.hooks[point.id] += _counting(site, root, reach)
        for path, attending in reach.attending.items():
            attends = Attends(site, point.id, attending)
            site.hooks[point.id].append(root.get_submodule(path).register_forward_pre_hook(attends, with_kwargs=True))
    if reach.seam is not None:
        others = [one for one in sites_of(module) if one is not site and one.seam is not None]
        site.seam_saved = others[0].seam_saved if others else reach.seam.install(module)
        site.seam = reach.seam
        site.hooks[point.id] = _counting(site, root, reach)


def _counting(site: Site, root: nn.Module, reach: Reach) -> list[Removable]:
    return [
        root.get_submodule(path).register_forward_pre_hook(Counts(site, counting), with_kwargs=True)
        for path, counting in reach.counting.items()
    ]


def attached_with(site: Site, point: InjectionPoint) -> InjectionPoint | None:
    """The point that the adapters which are at a point were built for."""
    slot = site.slots._modules.get(_key(point))
    return slot.point if isinstance(slot, Slot) else None


def move(old: nn.Module, new: nn.Module) -> None:
    """Takes the adapters of weights from a module to one of its own class, which has taken its place."""
    sites = sites_of(old)
    _put(old, ())
    for site in sites:
        site.slots.train(new.training)
        site.handler = handler_of(new)
        site.changed()
    _put(new, sites)


def detach(module: nn.Module, point: InjectionPoint, name: str, switch: Switch) -> None:
    """Takes one adapter away from one point of a module; the last one restores the module.

    A class that another library gave it after attaching stays, and then computes what the module's own does.
    """
    site = site_of(module, switch)
    if site is None:
        return
    adapted = is_adapted(module)
    key = _key(point)
    slot = site.slots._modules.get(key)
    if slot is None:
        return
    if (adapter := slot._modules.pop(name, None)) is not None:
        release(adapter)
    site.changed()
    if slot._modules:
        return
    del site.slots._modules[key]
    for hook in site.hooks.pop(point.id, ()):
        hook.remove()
    site.norms.pop(point.id, None)
    sites = sites_of(module)
    if isinstance(point, AttentionPoint) and site.seam is not None:
        if not any(one.seam is not None for one in sites if one is not site):
            site.seam.remove(module, site.seam_saved)
        site.seam = site.seam_saved = None
    last = not any(isinstance(one, Slot) for one in site.slots._modules.values())
    if last or slot.parameters_read:
        _put(module, [one for one in sites if one is not site or not last], adapted=adapted)


def is_adapted(module: nn.Module) -> bool:
    """Whether the module still has the class that attaching gave it."""
    site = module.__dict__.get(SITE)
    return site is not None and adapted_class(site.base, site.read) is type(module)


def _key(point: InjectionPoint) -> str:
    role = point.role.replace(".", "_")
    index = point.layout.index if isinstance(point, ParameterPoint) else None
    return role if index is None else f"{role}_{index}"
