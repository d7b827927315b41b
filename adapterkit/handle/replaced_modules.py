"""What is done when an adapted module is not where it was, or not as large: it is followed, or told."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adapterkit.backend import SITE
from adapterkit.engine import attach
from adapterkit.errors import ReplacedError
from adapterkit.handle.freezing import hand_over
from adapterkit.handle.places import Place, place_of
from adapterkit.handle.saved_tensors import keep_data
from adapterkit.handle.stand_ins import OriginalParameter
from adapterkit.points import InjectionPoint, ParameterPoint, Span

if TYPE_CHECKING:
    from adapterkit.engine.selection import Selection
    from adapterkit.handle.state import State

Shape = tuple[int, ...]


class Lookout:
    """A forward pre-hook of an adapted model: all is looked at once after each switch, what is near each time."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._seen: weakref.ref[Selection] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        switch = self._state.switch
        selection = switch.current
        if selection.idle and not switch.folded:
            return
        if switch.exchanging:
            keep_data(module)
        self._state.check(near=self._seen is not None and self._seen() is selection)
        if self._state.merge is not None:
            self._state.merge.ties.check()
        self._seen = weakref.ref(selection)

    def __getstate__(self) -> dict[str, Any]:
        return {"_state": self._state, "_seen": None}


def check_places(state: State) -> None:
    """Follows what goes on in a larger module: one to which rows were added, as a vocabulary's layers are resized.

    Raises:
        ReplacedError: Anything else is not where it was, or not as large.
    """
    with state.lock:
        lost = {place: now for place, now in state.places.lost().items() if not _follow(state, place, now)}
        told = [_replaced(state, place, now) for place, now in lost.items()]
        resized = {key: both for key, both in state.places.resized().items() if key[0] not in lost}
        told += [_resized(state, *key, *both) for key, both in resized.items() if not _grow(state, *key, *both)]
        told += [_unheard(state, *one) for one in state.places.unheard()]
    if told:
        more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
        raise ReplacedError(
            f"{told[0]}{more}. Put back what was there; or take the adapter off with remove() or detach(), and add it "
            "again"
        )


# -- another module ---------------------------------------------------------------------------------------------------


def _follow(state: State, place: Place, now: nn.Module | None) -> bool:
    """Takes adapters to a module that goes on where another one was; False where it does not."""
    old = state.places[place]
    if now is not None and attach.site_of(old, state.switch) is None and attach.site_of(now, state.switch) is not None:
        # Another handle has followed.
        state.places.move(place, now)
        return True
    merged = [one for one in (state.merge.originals if state.merge else ()) if one.module is old]
    if now is None or not _goes_on(old, now) or not all(isinstance(one, OriginalParameter) for one in merged):
        return False
    attach.move(old, now)
    hand_over(old, now)
    for one in merged:
        one.move(now)
    state.places.move(place, now)
    return True


def _goes_on(old: nn.Module, new: nn.Module) -> bool:
    """Whether a module is of another's class and begins with its very weights."""
    sites = attach.sites_of(old)
    if not sites or type(new) is not sites[0].base or SITE in new.__dict__:
        return False
    if any(site.seam or site.hooks or site.norms for site in sites):
        return False
    if new._modules or old._parameters.keys() != new._parameters.keys():
        return False
    return all(_begins_with(new._parameters[name], one) for name, one in old._parameters.items())


def _begins_with(new: nn.Parameter | None, old: nn.Parameter | None) -> bool:
    if new is None or old is None:
        return new is old
    if new.is_meta or old.is_meta or not old.ndim or new.shape[1:] != old.shape[1:] or len(new) < len(old):
        return False
    return torch.equal(new[: len(old)], old.to(new.device, new.dtype))


def _replaced(state: State, place: Place, now: nn.Module | None) -> str:
    what = "taken out" if now is None else f"replaced by another {type(now).__name__}"
    return f"{_name(place)} was {what} after {_users(state, place)} had been attached to it, which acts nowhere there"


# -- another size -----------------------------------------------------------------------------------------------------


def _grow(state: State, place: Place, name: str, was: Shape, now: Shape) -> bool:
    """Lets adapters act on the rows that there were, where some were added; False where that cannot be."""
    site = attach.site_of(state.places[place], state.switch)
    if site is None or not was or now[1:] != was[1:] or now[0] < was[0]:
        return False
    slots = [
        slot for slot in site.slots if isinstance(slot.point, ParameterPoint) and slot.point.layout.parameter == name
    ]
    grown = {slot.point.id: _first_rows(slot.point, was[0]) for slot in slots}
    if None in grown.values():
        return False
    for slot in slots:
        slot.point = grown[slot.point.id] or slot.point
    site.changed()
    for key, attached in state.adapters.items():
        state.adapters[key] = attached.at({id: point for id, point in grown.items() if point and id in attached.points})
    state.places.resize(place, name, now)
    return True


def _first_rows(point: InjectionPoint, rows: int) -> InjectionPoint | None:
    """The same point in a weight to which rows were added behind those; None where there is none."""
    if point.span is not None or point.in_span is not None:
        spans = [span for span in (point.span, point.in_span) if span is not None]
        return point if all(span.count == 1 for span in spans) else None
    if point.form == "linear":
        return dataclasses.replace(point, span=Span(0, rows))
    return dataclasses.replace(point, in_span=Span(0, rows)) if point.form == "embedding" else None


def _resized(state: State, place: Place, name: str, was: Shape, now: Shape) -> str:
    return f"the {name} of {_name(place)} is {now} now, and {_users(state, place)} was made for {was}"


def _unheard(state: State, place: Place, told: int, rows: int) -> str:
    return (
        f"{_name(place)} was resized to {told} rows, and its weight still has {rows}: while {_users(state, place)} "
        "acted, what was resized was what it makes of the weight. Set num_embeddings back, and resize inside disabled()"
    )


def _name(place: Place) -> str:
    return ".".join(part for part in place if part)


def _users(state: State, place: Place) -> str:
    found = [name for name, one in state.adapters.items() if any(place_of(p) == place for p in one.points.values())]
    return ", ".join(map(repr, found))
