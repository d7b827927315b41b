"""Hooks with which a site sees, and changes, what goes on around its module. They are classes, so as to be pickled."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from torch import nn

from adapterkit.backend import Attending, Counting, Reading
from adapterkit.engine.site import Site
from adapterkit.kernels.sequences import cut


class Tap:
    """A forward pre-hook that keeps the residual stream for one output point."""

    def __init__(self, site: Site, key: str) -> None:
        self.site, self.key = site, key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.site.active(self.key):
            self.site.switch.tap(self.key, args[0] if args else next(iter(kwargs.values())))


class End:
    """A forward pre-hook of the module before which a longer sequence ends; see `TokensLayout.until`."""

    def __init__(self, site: Site, key: str) -> None:
        self.site, self.key = site, key

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.site.active(self.key):
            return None
        length, added = self.site.switch.lengths(self.key)
        return (cut(args[0], slice(0, length - added), length), *args[1:])


class Whole:
    """A forward hook of the model that returns what happens inside; see `TokensLayout.whole`."""

    def __init__(self, site: Site, key: str) -> None:
        self.site, self.key = site, key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        if not self.site.active(self.key):
            return None
        length, added = self.site.switch.lengths(self.key)
        return cut(result, slice(0, length - added), length)


class Attends:
    """A forward pre-hook of a module that is given a longer sequence; see `Reach.attending`."""

    def __init__(self, site: Site, key: str, attending: Attending) -> None:
        self.site, self.key, self.attending = site, key, attending

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        plan = self.site.plan
        positions = None if plan is None else plan.lengthening.get(self.key)
        return None if positions is None else self.attending(module, positions, args, kwargs)


class Reads:
    """In the place of a method that reads what is within a longer sequence; see `Reach.reading`."""

    def __init__(self, site: Site, key: str, module: nn.Module, name: str, reading: Reading) -> None:
        self.site, self.key, self.reading = site, key, reading
        self.module, self.name, self.before = module, name, module.__dict__.get(name)
        module.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        read = self.before or MethodType(getattr(type(self.module), self.name), self.module)
        if not self.site.active(self.key):
            return read(*args, **kwargs)
        return self.reading(self.module, read, functools.partial(self.site.switch.lengths, self.key), args, kwargs)

    def remove(self) -> None:
        """Puts back what was there."""
        if self.before is None:
            self.module.__dict__.pop(self.name, None)
        else:
            self.module.__dict__[self.name] = self.before


class Counts:
    """A forward pre-hook of a module that makes positions; see `Reach.counting`."""

    def __init__(self, site: Site, counting: Counting) -> None:
        self.site, self.counting = site, counting

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        plan = self.site.plan
        if plan is None or plan.counts is None:
            return None
        front, padded = plan.counts
        if not front and (padded or kwargs.get("position_ids") is not None):  # told, or counted for another point
            return None
        return self.counting(module, args, kwargs, front=front, padded=padded)
