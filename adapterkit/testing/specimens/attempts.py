"""Calls of models that nobody has described: what a function takes, and which of several ways runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.testing.specimens.exact import InFloat64
from adapterkit.testing.specimens.specimen import NoSpecimen


def names_of(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)


def first_that_runs(function: Callable[..., Any], ways: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The first keyword arguments that a function runs with.

    Raises:
        NoSpecimen: With none; it says what came of each.
    """
    reasons = []
    for way in ways:
        try:
            with torch.no_grad(), InFloat64():
                function(**way)
        except Exception as error:  # noqa: BLE001 - of any kind: it is somebody else's code, with inputs that may be wrong
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            return way
    raise NoSpecimen(f"no way to call it is known ({'; '.join(reasons) or 'none to try'})")


def depends_on_row(function: Callable[..., Any], way: dict[str, Any]) -> bool:
    """Tell whether a function that runs so makes something else of one row than of the other, as it would of noise.

    A mask that hides all that is sensed, and is meant the other way round, runs too.
    """
    try:
        with torch.no_grad(), InFloat64():
            output = function(**way)
    except Exception:  # noqa: BLE001 - told by who tries it
        return True
    return not all(_alike(part) for part in tensors(output))


def _alike(part: Tensor) -> bool:
    halves = part.flatten().chunk(2)
    return len(halves) < 2 or torch.equal(*halves)


def tensors(output: object) -> Iterator[Tensor]:
    """The numbers that a model returned, out of whatever they are in."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)
