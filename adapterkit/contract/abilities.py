"""What a type of adapter module can do, told by what it defines. Torch-free."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_Method = TypeVar("_Method", bound=Callable[..., Any])


def by_default(method: _Method) -> _Method:
    """Marks a method of the contract that a type need not define, and that tells nothing of a type that does not."""
    method.by_default = True  # type: ignore[attr-defined]
    return method


@dataclass(frozen=True)
class Abilities:
    """What a type can do; `AdapterModule.abilities`, found once, when the class is made.

    Attributes:
        forward: It has a forward of its own.
        delta: It says what it adds to the output, as a function of x alone, by `delta` or by `factors`.
        adds: Its whole effect is that delta.
        low_rank: `factors`, where there are some, say all that it does: no subclass overrides the rest.
        several: It is adapters that act as one, and tells their effect as such: no type of a module.
        merge: It says what weight equals it.
        combine: It combines other adapters.
        extend: It acts on keys and values.
        attend: It has an attention of its own.
        lengthen: It makes sequences longer.
        initialise: It takes start values from the base.
        beside: Those of `extend` and `lengthen` that take a parameter `base`.
    """

    forward: bool = False
    delta: bool = False
    adds: bool = False
    low_rank: bool = False
    several: bool = False
    merge: bool = False
    combine: bool = False
    extend: bool = False
    attend: bool = False
    lengthen: bool = False
    initialise: bool = False
    beside: frozenset[str] = frozenset()

    @classmethod
    def of(cls, kind: type) -> Abilities:
        """Those of a class of modules."""
        additive = hasattr(kind, "added")
        forward, factors = _defines(kind, "forward"), additive and _defines(kind, "factors")
        delta = factors or (additive and _defines(kind, "delta"))
        merge = factors or _defines(kind, "merged") or _defines(kind, "delta_weight")
        others = {name: _defines(kind, name) for name in ("combine", "extend", "attend", "lengthen", "initialise")}
        low_rank = factors and all(_depth(kind, "factors") <= _depth(kind, name) for name in _FOLLOWING)
        beside = frozenset(name for name in ("extend", "lengthen") if others[name] and _takes_base(kind, name))
        adds = delta and not forward
        return cls(forward, delta, adds=adds, low_rank=low_rank, merge=merge, beside=beside, **others)


_FOLLOWING = ("delta", "added", "forward", "__call__", "delta_weight", "merged")
"""What follows from `factors`."""


def _defines(kind: type, name: str) -> bool:
    method = getattr(kind, name, None)
    return method is not None and not getattr(method, "by_default", False)


def _takes_base(kind: type, name: str) -> bool:
    return "base" in inspect.signature(getattr(kind, name)).parameters


def _depth(kind: type, name: str) -> int:
    """How many classes come before the one that defines this attribute."""
    return next(i for i, one in enumerate(kind.__mro__) if name in vars(one))
