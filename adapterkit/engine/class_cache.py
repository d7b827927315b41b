"""What is made once for a class of modules, and goes with it: classes that are made at run time are not kept."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

Given = ParamSpec("Given")
Made = TypeVar("Made")


def made_once(make: Callable[Given, Made]) -> Callable[Given, Made]:
    """Calls a function once for each class, its first argument, and for what else it is given.

    What it makes may refer to the class. It is kept as long as the class can be imported, and of one that cannot, such
    as one that a function or a notebook has made, as long as anybody uses it.
    """
    kept: dict[tuple[Any, ...], Any] = {}
    used: weakref.WeakKeyDictionary[type, dict[tuple[Any, ...], weakref.ref[Any]]] = weakref.WeakKeyDictionary()

    def of_made_class(cls: type, *more: Any) -> Any:
        own = used.setdefault(cls, {})
        found = own[more]() if more in own else None
        if found is not None:
            return found
        made: Any = make(cls, *more)  # type: ignore[call-arg]
        if _can_be_imported(cls):
            return kept.setdefault((cls, *more), made)  # another thread's, where it was quicker
        found = own.setdefault(more, weakref.ref(made))()
        if found is None:  # what was made before has gone
            own[more] = weakref.ref(made)
        return made if found is None else found

    @functools.wraps(make)
    def get(*key: Any) -> Any:
        found = kept.get(key)
        return of_made_class(*key) if found is None else found

    return cast("Any", get)


def _can_be_imported(cls: type) -> bool:
    """Whether a module holds the class for good; `__main__` may be a notebook, whose cells are run again."""
    found: Any = None if cls.__module__ == "__main__" else sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls
