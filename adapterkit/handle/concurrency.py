"""Whether a change would reach others in the middle: blocks of any thread or task, and calls of other threads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from adapterkit.engine.running_calls import others_inside
from adapterkit.engine.selection import Selection
from adapterkit.engine.switch import Switch
from adapterkit.errors import StateError

if TYPE_CHECKING:
    from adapterkit.handle.state import State


def require_no_calls(roots: Iterable[nn.Module], what: str) -> None:
    """Raises StateError where another thread is in a call of the models."""
    if others_inside(roots):
        raise StateError(
            f"cannot {what} while another thread is in a call of the model, which would see both; wait until it returns"
        )


def require_unused(switch: Switch, names: Iterable[str]) -> None:
    """Raises StateError where a block of another thread or task names one of these adapters."""
    used = {name for selection in switch.in_blocks(of_others=True) for name in selection.names}
    for name in names:
        if name in used:
            raise StateError(
                f"cannot remove {name!r}: it acts in an `activated` or `routed` block of another thread or task, which "
                "has to leave that first"
            )


def require_alike(switch: Switch, selection: Selection) -> None:
    """Raises StateError where a block of another thread or task says that something else acts."""
    for other in switch.in_blocks(of_others=True):
        if not other.equals(selection):
            told = ", ".join(map(repr, other)) or "nothing"
            raise StateError(
                f"cannot merge {', '.join(map(repr, selection))}: in a block of another thread or task {told} is to "
                "act, and weights are the same for all; it has to leave that first"
            )


def take_out(state: State, name: str) -> None:
    """Lets nobody choose an adapter from here on. Raises StateError where somebody has; nothing is changed then."""
    before, default = state.adapters, state.switch.default
    state.adapters = {other: one for other, one in before.items() if other != name}
    state.switch.default = default.without(frozenset({name}))
    try:
        require_unused(state.switch, [name])
        if name in default.names:  # who has it without a block
            require_no_calls(state.roots, f"remove {name!r}, which acts,")
    except StateError:
        state.adapters, state.switch.default = before, default
        raise
    state.switch.forget(name)
