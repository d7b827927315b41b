"""Specimens of diffusers' models: transformers, UNets and ControlNets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adapterkit.testing.specimens.diffusers_configs import shrunk_arguments
from adapterkit.testing.specimens.diffusers_inputs import LAYOUTS, inputs_of
from adapterkit.testing.specimens.diffusers_recipes import recipe_of
from adapterkit.testing.specimens.specimen import NoSpecimen, Specimen, strengthened


def specimen_of(model: nn.Module) -> Specimen:
    """A small copy of a model of diffusers.

    Raises:
        NoSpecimen: None can be made, or run.
    """
    name = type(model).__name__
    if not hasattr(model, "config"):
        raise NoSpecimen(f"{name} has no config: it is a list of models that have specimens of their own")
    try:
        small = _small(model)
    except Exception as error:
        raise NoSpecimen(f"no small {name} can be made: {_told(error)}") from error
    call = _runnable(small)
    return Specimen(small, {"forward": call})


def _small(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        small = type(model)(**shrunk_arguments(model))
        for parameter in small.parameters():
            if parameter.ndim == 3:  # stacks of experts are whatever was in memory
                nn.init.normal_(parameter, std=0.2)
        return strengthened(small)


def _runnable(model: nn.Module) -> Callable[[], Tensor]:
    recipe, failures = recipe_of(type(model)), []
    for layout in [recipe.layout] if recipe.layout else LAYOUTS:
        try:
            call = _call(model, inputs_of(model, recipe.inputs, layout))
            if not call().isfinite().all():
                failures.append(f"{layout}: what comes out is not finite")
                continue
        except Exception as error:  # noqa: BLE001 - whatever a model raises on what is not for it
            failures.append(f"{layout}: {_told(error)}")
        else:
            return call
    raise NoSpecimen(f"no small {type(model).__name__} can be run ({'; '.join(failures)})")


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad(), _Promoted(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            found = [part.double().flatten() for part in _tensors(model(**inputs))]
        return torch.cat(found)

    return call


class _Promoted(TorchFunctionMode):
    """Where a model makes embeddings in float32 whatever it is, layers see them in float64, as the layers are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LAYERS and len(args) > 1 and args[0].dtype == torch.float32 and args[1].dtype == torch.float64:
            args = (args[0].double(), *args[1:])
        return func(*args, **(kwargs or {}))


_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


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
