"""The adapters of one point, by name: the modules that attaching registers below an adapted module."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterModule
from adapterkit.backend import CHILD
from adapterkit.contract.layouts import Repeats
from adapterkit.engine.attending import Attending
from adapterkit.engine.expressions import acting_alone, outermost_last, taken_apart
from adapterkit.engine.moulds import begin
from adapterkit.engine.routed import Routed
from adapterkit.engine.selection import Selection, strength_at
from adapterkit.kernels.batches import Share
from adapterkit.kernels.gates import Gates
from adapterkit.kernels.rows import Routes
from adapterkit.kernels.sums import Acting, Active, Strength
from adapterkit.points import AttentionPoint, InjectionPoint, ParameterPoint

if TYPE_CHECKING:
    from adapterkit.engine.context import Side
    from adapterkit.engine.site import Site
    from adapterkit.engine.switch import Switch


class Slot(nn.Module):
    """The adapters of one point, by name. Registered below the adapted module.

    `repeats` and `hides` say of its batch and of its masks what `adapterkit.backend.Reach` does.
    Names are written into `_modules` directly: `add_module` refuses those that are attributes of nn.Module ("train").
    """

    point: InjectionPoint
    repeats: Repeats | None
    hides: bool
    ways: tuple[str, ...]
    parameters_read: tuple[str, ...]

    def __init__(
        self, point: InjectionPoint, repeats: Repeats | None = None, *, hides: bool = False, training: bool = True
    ) -> None:
        read, ways = (), (point.kind,)
        if isinstance(point, ParameterPoint) and (access := point.layout.access) != "call":
            read, ways = point.parameters, ("read",) if access == "read" else (point.kind, "read")
        begin(self, point=point, repeats=repeats, hides=hides, ways=ways, parameters_read=read, training=training)

    def adapters(self) -> Iterator[tuple[str, AdapterModule]]:
        """By name."""
        yield from self._modules.items()  # type: ignore[misc]

    def active(self, selection: Selection) -> Active:
        """What acts at this point, with its weights."""
        modules: dict[str, AdapterModule] = self._modules  # type: ignore[assignment]
        if selection.routes is None or torch.compiler.is_dynamo_compiling() or isinstance(self.point, AttentionPoint):
            return self._acting(selection, modules)
        return self._routed(selection, selection.routes, modules)

    def attending(self, selection: Selection) -> Active:
        """Of that, what has an attention of its own."""
        modules: dict[str, AdapterModule] = self._modules  # type: ignore[assignment]
        return self._acting(selection, {name: Attending(one) for name, one in modules.items() if one.abilities.attend})

    def _acting(self, selection: Selection, mine: Mapping[str, Any]) -> Active:
        compiling = torch.compiler.is_dynamo_compiling()
        found: list[tuple[Acting, Strength]] = []
        for expression, weight in selection.tensors if compiling else selection.acting:
            for acting in taken_apart(expression, mine):
                strength: Any = strength_at(weight, self.point)
                if isinstance(strength, Gates):
                    strength = strength.at(self.repeats)
                elif selection.routes is not None:
                    strength = Share(strength, selection.routes.batch(self.repeats, self.point.id))
                elif compiling and not acting.scalable:
                    strength = 1.0
                if not isinstance(strength, (int, float)) or strength != 0:
                    found.append((acting, strength))
        return outermost_last(found)

    def _routed(self, selection: Selection, routes: Routes, mine: Mapping[str, AdapterModule]) -> Active:
        """What acts for each row. A trace never asks: it computes all rows with each, wherever theirs are."""
        found = [(place, acting_alone(expression, mine)) for place, expression in enumerate(selection.weights)]
        placed = {place: acting for place, acting in found if acting is not None}
        batch = routes.batch(self.repeats, self.point.id)
        return [(Routed(placed, routes, batch), 1.0)] if placed else []

    def extra_repr(self) -> str:
        """The point's id, for `repr(model)`."""
        return self.point.id


_ALONE: ContextVar[bool] = ContextVar("adapterkit_base_alone", default=False)


@contextlib.contextmanager
def base_alone() -> Iterator[None]:
    """Inside, a state dict holds the base's own tensors alone."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


class Slots(nn.Module):
    """The slots of one adapted module, by role; with them those of other handles, in `Slots` of their own.

    A model's state dict has them. That of a part of the model is asked for by those who copy weights of the base into
    another one, and has not; nor has any while adapters are merged, as the weights then are what they do.

    Args:
        site: What is kept at the module. It hears of it where somebody asks for the named children: he may be about to
            put hooks around layers.
    """

    site: Site
    _absent = ""

    def __init__(self, site: Site, *, training: bool = True) -> None:
        begin(self, site=site, training=training)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        if destination is None or not self._is_left_out(prefix):
            given: Any = {"destination": destination, "prefix": prefix, "keep_vars": keep_vars}
            return super().state_dict(*args, **given)
        if not _ALONE.get() and self.site.switch.folded is None:
            warnings.warn(
                "the state dict of a part of a model holds the base's own tensors, without the adapters in it: "
                "Adapters.save() writes those, the state dict of the whole model has them, and after merge() the "
                "weights have what they do",
                stacklevel=2,
            )
        return destination

    def _is_left_out(self, prefix: str) -> bool:
        if _ALONE.get() or self.site.switch.folded is not None:
            return True
        path = next((slot.point.path for slot in self), "")
        whole = f"{path}.{CHILD}." if path else f"{CHILD}."
        return len(prefix) < len(whole) and f".{whole}".endswith(f".{prefix}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As torch's. Where a state dict leaves the adapters out, so may what is read."""
        self._absent = prefix if self._is_left_out(prefix) and not state_dict else ""
        if self._absent and not self._load_state_dict_post_hooks:
            self.register_load_state_dict_post_hook(_forgive)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for role, slot in zip(self._modules, self, strict=True):
            for name, adapter in slot.adapters():
                if is_held(adapter) and all(f"{prefix}{role}.{name}.{k}" in state_dict for k in adapter.state_dict()):
                    adapter.empty = False

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """None: who walks a tree to offload, cast or replace its layers leaves the adapters alone."""
        self.site.changed()
        return iter(())

    def children(self) -> Iterator[nn.Module]:
        """All of them."""
        return (module for module in self._modules.values() if module is not None)

    def __iter__(self) -> Iterator[Slot]:
        return iter([one for one in self._modules.values() if isinstance(one, Slot)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As torch's. A cast to floats of eight bits is for frozen weights: here it is a move alone."""

        def applied(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            narrowed = made.is_floating_point() and made.element_size() == 1 < tensor.element_size()
            return tensor.to(made.device) if narrowed else made

        waiting = [adapter for slot in self for _, adapter in slot.adapters() if has_meta(adapter)]
        super()._apply(applied, recurse)
        for adapter in waiting:
            if not has_meta(adapter):  # `to_empty`: memory, and what happens to be in it
                adapter.empty = True
                self.site.changed()
        return self


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters and buffers."""
    return itertools.chain(module.parameters(), module.buffers())


def is_held(module: nn.Module) -> bool:
    """Whether its state dict has all of them: there is no buffer that no file holds."""
    return len(module.state_dict()) >= len([*tensors_of(module)])


def has_meta(module: nn.Module) -> bool:
    """Whether one of them is on the meta device."""
    # Asked at each point, and torch's iterators take three times as long.
    for own in (module._parameters, module._buffers):
        for tensor in own.values():
            if tensor is not None and tensor.is_meta:
                return True
    return any(child is not None and has_meta(child) for child in module._modules.values())


def _forgive(slots: Any, keys: Any) -> None:
    """A hook after loading: what was left out is not missing."""
    if slots._absent:
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(slots._absent)]


Found = list[tuple[Slot, Active]]
"""Slots at which something acts, with what does."""


def side_of(switch: Switch, slot: Slot) -> Side:
    """Gives the side inputs of a slot's point, for the rows of an input."""
    return lambda x: switch.side(x, slot.point.id, slot.repeats)
