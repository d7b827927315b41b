"""Every public method has a docstring, its own or that of the method it overrides."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import adapterkit


def _modules() -> Iterator[str]:
    for found in pkgutil.walk_packages(adapterkit.__path__, "adapterkit."):
        if not found.name.endswith("__main__") and not found.name.startswith("adapterkit.engine"):  # nobody's contract
            yield found.name


def _undocumented(module: str) -> Iterator[str]:
    for cls in vars(importlib.import_module(module)).values():
        if not inspect.isclass(cls) or cls.__module__ != module or cls.__name__.startswith("_"):
            continue
        for name, member in vars(cls).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if name.startswith("_") or not inspect.isfunction(function) or function.__name__ != name:  # a field
                continue
            if not any(inspect.getdoc(vars(base).get(name)) for base in cls.__mro__ if name in vars(base)):
                yield f"{module}.{cls.__qualname__}.{name}"


def test_public_methods_are_documented() -> None:
    assert [name for module in _modules() for name in _undocumented(module)] == []
