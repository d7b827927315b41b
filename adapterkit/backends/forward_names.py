"""What the code of a forward names, and that of what it calls. Nothing is run."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from adapterkit.mapping.structure import base_class

_DEPTH = 4
"""How far calls are followed from a forward."""


def mentions(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether the code of a module's forward, or of what it calls, has one of these names.

    Followed are its own methods, functions of its library, and the processor of a module of diffusers.
    """
    return _class_mentions(base_class(module), type(getattr(module, "processor", None)), names)


def asks_attribute_of(module: nn.Module, name: str) -> bool:
    """Whether a module's forward calls `getattr(name, ...)`, which finds nothing that is kept there under a key."""
    calls = dis.get_instructions(_plain(base_class(module).forward))
    loads = [one.argval for one in calls if one.opname == "LOAD_GLOBAL"]
    return ("getattr", name) in itertools.pairwise(loads)


def method_mentions(module: nn.Module, method: str, names: frozenset[str]) -> bool:
    """Whether the code of a module's method, where it has one of this name, has one of these names itself."""
    function = _plain(getattr(base_class(module), method, None))
    return isinstance(function, FunctionType) and not names.isdisjoint(_names(function.__code__))


@functools.lru_cache(maxsize=1024)
def _class_mentions(cls: type[nn.Module], processor: type, names: frozenset[str]) -> bool:
    starts: list[Any] = [cls.forward, processor.forward if issubclass(processor, nn.Module) else processor.__call__]
    return any(_mentions(_plain(start), (cls, processor), names, _DEPTH, set()) for start in starts)


def _mentions(function: Any, owners: tuple[type, ...], wanted: frozenset[str], depth: int, seen: set[CodeType]) -> bool:
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return False
    seen.add(function.__code__)
    names = set(_names(function.__code__))
    if names & wanted:
        return True
    if not depth:
        return False
    library = function.__module__.partition(".")[0]
    found = [function.__globals__.get(name) for name in names]
    called = [one for one in found if isinstance(one, FunctionType) and one.__module__.partition(".")[0] == library]
    called += [vars(cls)[name] for owner in owners for cls in owner.__mro__ for name in names if name in vars(cls)]
    return any(_mentions(_plain(one), owners, wanted, depth - 1, seen) for one in called)


def _plain(one: Any) -> Any:
    """The function of a method; what stands under decorators."""
    one = one.__func__ if isinstance(one, (staticmethod, classmethod)) else one
    return inspect.unwrap(one) if callable(one) else one


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
