"""The module tree of a base, whatever adapters are in it, and whether it is still the one that was looked at."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from adapterkit.backend import CHILD, SITE

_SIZES = frozenset((int, tuple, str))
"""Types of the attributes that say what a layer computes: widths, heads, strides, modes."""


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it is without adapters."""
    return getattr(module.__dict__.get(SITE), "base", type(module))


def named_base_modules(
    module: nn.Module, *, repeated: bool = False, prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """As torch's `named_modules`, without what adapters have put below.

    Args:
        module: Where to begin.
        repeated: Whether a module is given under each of its names.
        prefix: In front of each path.
        seen: Ids of the modules that were given already.
    """
    seen = set() if seen is None else seen
    if id(module) in seen and not repeated:
        return
    seen.add(id(module))
    yield prefix, module
    for name, child in _children(module):
        yield from named_base_modules(
            child, repeated=repeated, prefix=f"{prefix}.{name}" if prefix else name, seen=seen
        )


def base_modules(roots: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Every module that is no adapter's, once, without its name: as `named_base_modules`, for several models."""
    stack, seen = [*roots][::-1], set[int]()
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        stack += [child for _, child in reversed(_children(module))]


class Picture:
    """A module tree as it was. It keeps no module alive.

    What it sees: modules that were put in, taken out, replaced or renamed, of another class, with parameters of another
    name, shape or dtype, with other buffers, and changed numbers, words or tuples in a module's own attributes. What it
    does not see is what a module keeps in other objects, such as the config of a transformers model.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        roots = [*roots]
        self._roots = [*map(id, roots)]
        self._modules = [(weakref.ref(module), _facts(module)) for module in base_modules(roots)]

    def shows(self, roots: Iterable[nn.Module]) -> bool:
        """Whether these are the same modules, unchanged."""
        if [*map(id, roots)] != self._roots:
            return False
        # No walk: where each has the children that it had, the tree is what it was.
        for reference, known in self._modules:
            module = reference()
            if module is None or _facts(module) != known:
                return False
        return True


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    found = [(name, child) for name, child in module._modules.items() if child is not None]
    return [item for item in found if item[0] != CHILD] if SITE in module.__dict__ else found


def _facts(module: nn.Module) -> tuple[Any, ...]:
    own = module.__dict__
    cls = type(module)  # adapting a module gives it another class of the same name
    return (
        cls.__module__,
        cls.__qualname__,
        [(name, id(child)) for name, child in _children(module)] if module._modules else [],
        [(name, _size(p)) for name, p in module._parameters.items()] if module._parameters else [],
        [*module._buffers.keys()] if module._buffers else [],  # a scripted module's have no iterator
        [*itertools.compress(own.items(), map(_SIZES.__contains__, map(type, own.values())))],  # no loop of Python's
    )


def _size(parameter: nn.Parameter | None) -> tuple[Any, ...] | None:
    if parameter is None or (type(parameter) is not nn.Parameter and is_lazy(parameter)):
        return None
    return (parameter.shape, parameter.dtype)
