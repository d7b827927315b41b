"""What is done when a module that was adapted is not where it was: it is told, or followed."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adapterkit.errors import ReplacedError
from adapterkit.handle.places import Place, place_of

if TYPE_CHECKING:
    from adapterkit.engine.selection import Selection
    from adapterkit.handle.state import State


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
        self._state.check(near=self._seen is not None and self._seen() is selection)
        self._seen = weakref.ref(selection)

    def __getstate__(self) -> dict[str, Any]:
        return {"_state": self._state, "_seen": None}


def check_places(state: State) -> None:
    """Raises ReplacedError where an adapted module is not where it was."""
    with state.lock:
        lost = state.places.lost()
    if lost:
        raise ReplacedError(_told(state, lost))


def _told(state: State, lost: dict[Place, nn.Module | None]) -> str:
    (place, now), more = next(iter(lost.items())), len(lost) - 1
    name = ".".join(part for part in place if part)
    users = [
        repr(name) for name, one in state.adapters.items() if any(place_of(p) == place for p in one.points.values())
    ]
    what = "taken out" if now is None else f"replaced by another {type(now).__name__}"
    also = f", and {more} more modules were" if more else ""
    return (
        f"{name} was {what} after {', '.join(users)} had been attached to it{also}: there the adapter acts nowhere. "
        "Put the old module back; or take the adapter off with remove() or detach(), and add it again"
    )
