"""Types that adapt themselves after every step, in a loop that never tells them of one: a warning, once.

Nothing in a plain loop is ours but the adapter's parameters. That an optimizer has changed one since the last backward
is how a step is noticed; the look costs a backward nothing.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from adapterkit.handle.building import Built
from adapterkit.handle.state import Attached

_STEPS = 3


class Untold:
    """Counts the steps of an adapter of which it was not told.

    Args:
        name: What the adapter is called.
        part: One of its types, which trains.
    """

    def __init__(self, name: str, part: Built) -> None:
        self._name, self._type = name, type(part.config).__name__
        self._version: int | None = None
        self._steps = 0
        parameters = (parameter for module in part.modules.values() for parameter in module.parameters())
        first = next((parameter for parameter in parameters if parameter.requires_grad), None)
        self._hook: RemovableHandle | None = None
        if first is not None:
            self._hook = first.register_post_accumulate_grad_hook(self)

    def __call__(self, parameter: Tensor) -> None:
        """After a backward."""
        self._steps += self._version not in (None, parameter._version)
        self._version = parameter._version
        if self._steps >= _STEPS:
            self.stop()
            warnings.warn(
                f"{self._name!r} ({self._type}) adapts itself after each optimizer step, and was not told of the last "
                f"{_STEPS}: it stays as it was made. Call adapters.after_step(step, steps) between optimizer.step() "
                "and zero_grad(), and add adapters.penalty() to the loss",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:  # a copied parameter has no hooks
        return {**self.__dict__, "_hook": None}

    def stop(self) -> None:
        """The adapter was told, or trains no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def watch_steps(name: str, attached: Attached) -> None:
    """Begins to count the steps of an adapter that trains, where it wants to be told of them."""
    if not attached.untold:
        attached.untold.extend(Untold(name, part) for part in attached.parts if part.config.adapts)
