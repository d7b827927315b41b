"""Calls of a module's forward with others around them, and how several of those go one around the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Around = Callable[[nn.Module, Forward, Args, Kwargs], Any]
"""`(module, forward, args, kwargs)`: a call of the module's forward with adapters around it."""


def nested(arounds: list[Around], instead: Forward | None) -> Around | None:
    """The last of them around all others."""
    if not arounds:
        return None if instead is None else functools.partial(_replaced, instead)
    call = arounds[0] if instead is None else functools.partial(_around_replaced, arounds[0], instead)
    for around in arounds[1:]:
        call = functools.partial(_around_another, around, call)
    return call


def _replaced(
    instead: Forward,
    module: nn.Module,
    forward: Forward,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    return instead(module, *args, **kwargs)


def _around_replaced(
    around: Around,
    instead: Forward,
    module: nn.Module,
    forward: Forward,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    return around(module, functools.partial(instead, module), args, kwargs)


def _around_another(
    outer: Around,
    inner: Around,
    module: nn.Module,
    forward: Forward,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    return outer(module, lambda *args, **kwargs: inner(module, forward, args, kwargs), args, kwargs)


def first_argument(forward: Forward, args: Args, kwargs: Kwargs) -> tuple[Any, Callable[[Any], Any]]:
    """The module's input, and the forward as a function of it alone."""
    if args:
        return args[0], lambda x: forward(x, *args[1:], **kwargs)
    name = next(iter(kwargs))
    return kwargs[name], lambda x: forward(**{**kwargs, name: x})
