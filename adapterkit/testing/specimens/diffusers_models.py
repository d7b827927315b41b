"""Specimens of diffusers' models: transformers, UNets and ControlNets."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.testing.specimens.diffusers_configs import shrunk_arguments
from adapterkit.testing.specimens.diffusers_hosts import host_of
from adapterkit.testing.specimens.diffusers_inputs import LAYOUTS, inputs_of
from adapterkit.testing.specimens.diffusers_recipes import recipe_of
from adapterkit.testing.specimens.exact import InFloat64
from adapterkit.testing.specimens.specimen import NoSpecimen, Specimen, strengthened


def specimen_of(model: nn.Module) -> Specimen:
    """A small copy of a model of diffusers.

    Raises:
        NoSpecimen: None can be made, or run.
    """
    name = type(model).__name__
    nets = getattr(model, "nets", None)
    if isinstance(nets, nn.ModuleList):  # several ControlNets, each of which is run by itself
        each = [specimen_of(net) for net in nets]
        made = type(model)([one.model for one in each])
        return Specimen(made.eval(), {f"nets.{i}": one.calls["forward"] for i, one in enumerate(each)})
    try:
        small, host = _small(model)
    except Exception as error:
        raise NoSpecimen(f"no small {name} can be made: {_told(error)}") from error
    call = _runnable(host)
    return Specimen(small, {"forward": call})


def _small(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A small copy, and what is called to run it."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        small = type(model)(**shrunk_arguments(model))
        for parameter in small.parameters():
            if parameter.ndim == 3:  # stacks of experts are whatever was in memory
                nn.init.normal_(parameter, std=0.2)
        small = strengthened(small)
        return small, host_of(small)


def _runnable(model: nn.Module) -> Callable[[], Tensor]:
    recipe, failures = recipe_of(type(model)), []
    layouts = [recipe.layout] if recipe.layout else LAYOUTS
    for layout, exact in itertools.product(layouts, (True, False)):  # what compiles itself cannot be made exact
        try:
            call = _call(model, inputs_of(model, recipe.inputs, layout), exact=exact)
            if not call().isfinite().all():
                failures.append(f"{layout}: what comes out is not finite")
                continue
        except Exception as error:  # noqa: BLE001 - whatever a model raises on what is not for it
            failures.append(f"{layout}: {_told(error)}")
        else:
            return call
    raise NoSpecimen(f"no small {type(model).__name__} can be run ({'; '.join(failures)})")


def _call(model: nn.Module, inputs: Mapping[str, Any], *, exact: bool) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with InFloat64() if exact else contextlib.nullcontext(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            found = [part.double().flatten() for part in _tensors(model(**inputs))]
        return torch.cat(found)

    return call


def _tensors(result: object) -> Iterator[Tensor]:
    """All tensors in what a model returns."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for part in result.values():
            yield from _tensors(part)
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from _tensors(part)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
