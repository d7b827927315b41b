"""In and out of a module tree.

An adapted module stays where it is: same path, same parameters, still an instance of its class. Its class becomes a
dynamic subclass whose forward asks the `Site` kept in the module's `__dict__`; the adapter modules are registered below
the module, so that `.to`, sharding and `train()` reach them. Detaching restores class, `__dict__` and children.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterkit.adapter import AdapterModule
from adapterkit.backend import SITE, AttentionSeam
from adapterkit.compose import Active, Computed, Selection, SpanBase, SublayerBase, combine, extend_all
from adapterkit.errors import AttachError
from adapterkit.kernels.spans import write_spans
from adapterkit.kernels.weights import feature_dim
from adapterkit.points import InjectionPoint, OutputLayout, WeightLayout

CHILD = "adapterkit"
"""Name of the child module that holds the adapter modules of an adapted module."""


class _Local(threading.local):
    """What is this thread's own; `__init__` runs once in each thread.

    The attributes are set on the instance: torch.compile guards what it reads, and a class-level default that an
    instance attribute shadows later would not be read again.
    """

    def __init__(self) -> None:
        self.selection: Selection | None = None
        self.taps: dict[str, Tensor] = {}


class Switch:
    """What acts, for every site of a model: one default, which a thread may override for itself."""

    def __init__(self) -> None:
        self.default = Selection()
        self.local = _Local()

    @property
    def current(self) -> Selection:
        """The selection that a forward in this thread sees."""
        own = self.local.selection
        return self.default if own is None else own

    @contextlib.contextmanager
    def overridden(self, selection: Selection) -> Iterator[None]:
        """This thread sees another selection inside the block."""
        local = self.local
        before = local.selection
        local.selection = selection
        try:
            yield
        finally:
            local.selection = before

    def tap(self, key: str, x: Tensor) -> None:
        """Keeps the residual stream until the sublayer has run."""
        self.local.taps[key] = x

    def take(self, key: str) -> Tensor:
        """What was tapped last under this key."""
        taps = self.local.taps
        if key not in taps:
            raise AttachError(
                f"the sublayer at {key} ran without its residual stream; was it called outside its block?"
            )
        return taps.pop(key)

    def __getstate__(self) -> dict[str, Any]:
        return {"default": self.default}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.default = state["default"]
        self.local = _Local()


class Slot(nn.Module):
    """The adapters of one point, by name. Registered below the adapted module.

    Names are written into `_modules` directly: `add_module` refuses those that are attributes of nn.Module ("train").
    """

    def __init__(self, point: InjectionPoint) -> None:
        super().__init__()
        self.point = point

    def active(self, selection: Selection) -> list[tuple[AdapterModule, float]]:
        """The adapters of this point that act, with their weights."""
        mine = self._modules
        return [(mine[name], weight) for name, weight in selection.weights.items() if weight and name in mine]  # type: ignore[misc]

    def extra_repr(self) -> str:
        """The point's id, for `repr(model)`."""
        return self.point.id


class Slots(nn.Module):
    """The slots of one adapted module, by role."""

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._modules.values())  # type: ignore[arg-type]


@dataclass
class Site:
    """What acts at one adapted module. Kept in the module's `__dict__`, so it is copied and pickled along."""

    switch: Switch
    slots: Slots = field(default_factory=Slots)
    norms: dict[str, tuple[nn.Module | None, nn.Module | None]] = field(default_factory=dict)
    taps: dict[str, RemovableHandle] = field(default_factory=dict)
    seam: AttentionSeam | None = None
    seam_saved: object = None

    def active(self, kind: str) -> list[tuple[Slot, Active]]:
        """The slots of one kind at which something acts now."""
        selection = self.switch.current
        if not selection.weights:
            return []
        found = [(slot, slot.active(selection)) for slot in self.slots if slot.point.kind == kind]
        return [(slot, active) for slot, active in found if active]

    def call(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The adapted module's forward. With nothing active it is the module's own forward and nothing else."""
        if not self.switch.current.weights:
            return forward(*args, **kwargs)
        if self.seam is not None and self.seam.forward is not None and self.active("attention"):
            forward = functools.partial(self.seam.forward, module)
        for around in (self._weights, self._tokens, self._output):
            forward = around(forward)
        return forward(*args, **kwargs)

    def extend(
        self, keys: Tensor, values: Tensor, mask: Tensor | None, *, queries: int, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `adapterkit.backend.Extension`."""
        for _, active in self.active("attention"):
            keys, values, mask = extend_all(keys, values, mask, active, queries=queries, causal=causal)
            causal = False
        return keys, values, mask

    def _weights(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        found = self.active("weight")
        if not found:
            return forward

        def adapted(*args: Any, **kwargs: Any) -> Any:
            x, run = _first_argument(forward, args, kwargs)
            whole = Computed(run, x)
            if found[0][0].point.span is None:
                return combine(x, whole, found[0][1])
            layout = found[0][0].point.layout
            dim = feature_dim(layout) if isinstance(layout, WeightLayout) else -1
            parts = []
            for slot, active in found:
                span = slot.point.span
                if span is not None:
                    parts.append((span, combine(x, SpanBase(whole, span, dim), active)))
            return write_spans(whole(x), parts, dim)

        return adapted

    def _tokens(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        found = self.active("tokens")
        if not found:
            return forward

        def adapted(*args: Any, **kwargs: Any) -> Any:
            x, run = _first_argument(forward, args, kwargs)
            return combine(x, Computed(run, x), found[0][1])

        return adapted

    def _output(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        found = self.active("output")
        if not found:
            return forward

        def adapted(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            # Attention modules return (output, weights, ...): the sublayer's output is the first.
            output = result[0] if isinstance(result, tuple) else result
            for slot, active in found:
                x = self.switch.take(slot.point.id)
                output = combine(x, SublayerBase(x, output, *self.norms[slot.point.id]), active)
            return (output, *result[1:]) if isinstance(result, tuple) else output

        return adapted


class _Tap:
    """A forward pre-hook that keeps the residual stream for one output point. A class, so that it can be pickled."""

    def __init__(self, slot: Slot, switch: Switch) -> None:
        self.slot, self.switch = slot, switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.slot.active(self.switch.current):
            self.switch.tap(self.slot.point.id, args[0] if args else next(iter(kwargs.values())))


def _first_argument(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Callable[[Any], Any]]:
    """The module's input, and the forward as a function of it alone."""
    if args:
        return args[0], lambda x: forward(x, *args[1:], **kwargs)
    name = next(iter(kwargs))
    return kwargs[name], lambda x: forward(**{**kwargs, name: x})


@functools.cache
def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose instances ask their site. It bears its base's name."""

    class Adapted(base):  # type: ignore[misc,valid-type]
        @functools.wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.__dict__[SITE].call(self, super().forward, args, kwargs)

        def __reduce_ex__(self, protocol: Any, /) -> tuple[Any, ...]:
            # A dynamic class cannot be pickled by reference: rebuild it from its base.
            return _empty_instance, (base,), self.__getstate__() if hasattr(base, "__getstate__") else self.__dict__

    Adapted.__name__, Adapted.__qualname__, Adapted.__module__ = base.__name__, base.__qualname__, base.__module__
    Adapted.__doc__ = base.__doc__
    return Adapted


def _empty_instance(base: type[nn.Module]) -> nn.Module:
    cls = adapted_class(base)
    return cls.__new__(cls)


def site_of(module: nn.Module) -> Site | None:
    """The site of an adapted module."""
    return module.__dict__.get(SITE)


def refusal(module: nn.Module) -> str | None:
    """Why this module cannot be adapted in place, or None."""
    if site_of(module) is not None:
        return None
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (an offload hook?); attach adapters before such hooks"
    if isinstance(module._modules.get(CHILD), nn.Module):
        return f"it already has a child called {CHILD!r}"
    if any(name.startswith("__jit") for name in type(module).__dict__):
        return "it is scripted"
    return None


def attach(
    root: nn.Module,
    point: InjectionPoint,
    name: str,
    adapter: AdapterModule,
    switch: Switch,
    seam: AttentionSeam | None,
) -> None:
    """Puts one adapter at one point. All checks have been made; this cannot fail half way."""
    module = root.get_submodule(point.path)
    site = site_of(module)
    if site is None:
        site = Site(switch)
        site.slots.train(module.training)
        module.__dict__[SITE] = site
        module._modules[CHILD] = site.slots
        module.__class__ = adapted_class(type(module))
    key = _key(point)
    slot = site.slots._modules.get(key)
    if not isinstance(slot, Slot):
        slot = Slot(point)
        slot.train(module.training)
        site.slots._modules[key] = slot
        _connect(root, module, site, slot, seam)
    slot._modules[name] = adapter


def _connect(root: nn.Module, module: nn.Module, site: Site, slot: Slot, seam: AttentionSeam | None) -> None:
    point, layout = slot.point, slot.point.layout
    if isinstance(layout, OutputLayout):
        norms = (layout.norm_in, layout.norm_out)
        first, second = (None if path is None else root.get_submodule(path) for path in norms)
        site.norms[point.id] = (first, second)
        residual = root.get_submodule(layout.residual)
        site.taps[point.id] = residual.register_forward_pre_hook(_Tap(slot, site.switch), with_kwargs=True)
    if seam is not None:
        site.seam, site.seam_saved = seam, seam.install(module)


def detach(root: nn.Module, point: InjectionPoint, name: str) -> None:
    """Takes one adapter away from one point; the last one restores the module."""
    module = root.get_submodule(point.path)
    site = site_of(module)
    if site is None:
        return
    key = _key(point)
    slot = site.slots._modules[key]
    if slot is None:
        return
    slot._modules.pop(name, None)
    if slot._modules:
        return
    del site.slots._modules[key]
    if handle := site.taps.pop(point.id, None):
        handle.remove()
    site.norms.pop(point.id, None)
    if point.kind == "attention" and site.seam is not None:
        site.seam.remove(module, site.seam_saved)
        site.seam = site.seam_saved = None
    if not site.slots._modules:
        del module.__dict__[SITE]
        del module._modules[CHILD]
        module.__class__ = type(module).__mro__[1]


def is_adapted(module: nn.Module) -> bool:
    """Whether the module still has the class that attaching gave it."""
    return site_of(module) is not None and adapted_class(type(module).__mro__[1]) is type(module)


def _key(point: InjectionPoint) -> str:
    return point.role.replace(".", "_")
