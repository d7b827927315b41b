"""A model that is written for others while adapters are attached: the base's own tensors, and a warning that says so.

What stands in such a method's place stands on the instance, in front of the class's own.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from adapterkit.engine.slots import base_alone
from adapterkit.mapping.component import Component

if TYPE_CHECKING:
    from adapterkit.handle.state import State


class Export:
    """What stands in a method's place. A class, so that it can be copied and pickled.

    Args:
        state: Whose adapters are left out.
        root: The model.
        method: The method's name.
    """

    def __init__(self, state: State, root: nn.Module, method: str) -> None:
        self._state, self._root, self._method = state, root, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = getattr(type(self._root), self._method).__get__(self._root)
        if "state_dict" in kwargs:  # who gives one says what is written; transformers' Trainer does
            return own(*args, **kwargs)
        with base_alone():
            written = own(*args, **kwargs)
        if self._state.merge is None:
            names = ", ".join(map(repr, self._state.adapters))
            warnings.warn(
                f"{self._method}() has written the base, without the adapters on it ({names}): save() writes those, "
                "and bake() or merge() leaves them in the weights",
                stacklevel=2,
            )
        return written

    def of(self, state: State) -> bool:
        """Whether a state has put it there."""
        return self._state is state

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self._root), self._method).__get__(self._root))


def export(state: State, component: Component) -> None:
    """Puts what its backend asks for in front of a model's methods, and of those of its parts."""
    for model, name in _writing(component):
        if callable(getattr(type(model), name, None)):
            model.__dict__.setdefault(name, Export(state, model, name))


def unexport(state: State, component: Component) -> None:
    """Takes away what a state has put there."""
    for model, name in _writing(component):
        found = model.__dict__.get(name)
        if isinstance(found, Export) and found.of(state):
            del model.__dict__[name]


def _writing(component: Component) -> Iterator[tuple[nn.Module, str]]:
    return ((one.module, name) for one in component.within for name in one.backend.writes)
