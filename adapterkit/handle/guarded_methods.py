"""Methods of a model that would put other layers in the place of adapted ones: errors while adapters are attached.

A guard stands on the instance, in front of the class's method, so that it costs a forward nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from adapterkit.errors import StateError
from adapterkit.mapping.component import Component
from adapterkit.mapping.structure import base_modules


@dataclass(frozen=True)
class Guard:
    """What stands in a method's place. A class, so that it can be copied and pickled."""

    method: str
    reason: str

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise StateError(f"{self.method}() is refused while adapters are attached: {self.reason}")


def guard(component: Component) -> None:
    """Puts the guards that its backend asks for on a model."""
    for module, name, reason in _guarded(component):
        module.__dict__.setdefault(name, Guard(name, reason))


def unguard(component: Component) -> None:
    """Takes them away again."""
    for module, name, _ in _guarded(component):
        if isinstance(module.__dict__.get(name), Guard):
            del module.__dict__[name]


def _guarded(component: Component) -> Iterator[tuple[nn.Module, str, str]]:
    for one in component.within:
        if refused := one.backend.refuses:
            for module in base_modules([one.module]):
                methods = ((name, why) for name, why in refused.items() if callable(getattr(type(module), name, None)))
                yield from ((module, *method) for method in methods)
