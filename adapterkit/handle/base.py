"""What every part of a handle needs: the model's state, and names in it."""

from __future__ import annotations

from collections.abc import Mapping

from adapterkit.engine.selection import Selection
from adapterkit.errors import StateError
from adapterkit.handle import choices
from adapterkit.handle.choices import Choice
from adapterkit.handle.state import Attached, State, mapped_as_found, state_of


class Access:
    """A model and the adapters on it. See `adapterkit.handle.adapters.Adapters` for the arguments."""

    def __init__(self, model: object, *, backend: str | None = None, roles: Mapping[str, str] | None = None) -> None:
        self._mapped = mapped_as_found(model, backend, roles)
        self._fresh = State(self._mapped)

    @property
    def _state(self) -> State:
        return state_of(self._mapped) or self._fresh

    def _attached(self, name: str) -> Attached:
        choices.check_names([name], self._state.adapters)
        return self._state.adapters[name]

    def _selection(self, choice: Choice) -> Selection:
        return choices.to_selection(choice, self._state.adapters)

    def _require_outside(self, what: str) -> None:
        if self._state.switch.local.selection is not None:
            raise StateError(
                f"{what} sets what acts outside of `activated`, `disabled` and `routed`: inside such a block it would "
                "change nothing; leave it first"
            )

    def _require_unmerged(self, what: str) -> None:
        merge = self._state.merge
        if merge is not None:
            raise StateError(f"cannot {what} while {', '.join(map(repr, merge.selection))} is merged; unmerge() first")
