"""Specimens of timm's models: the same architecture, built again by its name with small sizes."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.testing.specimens.specimen import NoSpecimen, Specimen, normalise, strengthened
from adapterkit.testing.specimens.timm_sizes import CLASSES, MODULES, Small

_LIMIT = 150_000_000
"""Parameters that a specimen may have."""

_SIDE = 64
"""Of images for models that are built in their own size, where they take others than those of their training."""

_NO_FIT = (TypeError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError, ArithmeticError)
"""What timm raises where sizes do not fit together; which do, it says nowhere else."""

_Plan = tuple[Callable[[], nn.Module], int]
"""What builds a copy, and the side of its images."""


def specimen_of(model: nn.Module) -> Specimen:
    """A specimen of a model of timm: in small sizes where its class takes them, else in its own, on small images.

    Raises:
        NoSpecimen: It was not made by name and has no weights, is too large, or has a form that its name does not tell.
    """
    reasons: list[str] = []
    for build, side in _plans(model):
        try:
            return _specimen(build, side, model)
        except NoSpecimen as error:
            reasons.append(error.reason)
        except _NO_FIT as error:
            reasons.append(f"{type(error).__name__}: {error}")
    reasons = reasons or ["it was not made by timm.create_model, and has no weights to copy"]
    raise NoSpecimen(f"no small copy of {type(model).__name__} can be built and run: {'; '.join(reasons)}")


def _plans(model: Any) -> Iterator[_Plan]:
    """Ways to build a copy, the smallest first."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name, own = config.get("architecture"), config.get("input_size", (3, 224, 224))[-1]
    if name is not None:
        module = importlib.import_module("timm.models._registry")._model_to_module.get(name)
        if small := MODULES.get(module, CLASSES.get(type(model).__name__)):
            yield functools.partial(_small, model, name, small), small.side
        full = functools.partial(importlib.import_module("timm").create_model, name)
        yield from ((full, side) for side in (_SIDE, own))
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield from ((functools.partial(copy.deepcopy, model), side) for side in (_SIDE, own))


def _small(model: nn.Module, name: str, small: Small) -> nn.Module:
    if small.built == "function":
        return importlib.import_module("timm").create_model(name, **small.options)
    cls: Any = type(model)
    if small.built == "config":
        config = importlib.import_module(cls.__module__).model_cfgs[name]
        return cls(replace(config, **small.options), img_size=small.side)
    stages: Any = model.get_submodule("stages") if small.takes else ()
    read = {key: [type(stage.get_submodule(path)) for stage in stages] for key, path in small.takes.items()}
    return cls(**small.options, **read)


def _specimen(build: Callable[[], nn.Module], side: int, model: nn.Module) -> Specimen:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build().parameters())
    if count > _LIMIT:
        raise NoSpecimen(f"it has {count // 10**6} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        made = strengthened(_calm(build()))
        images = torch.randn(2, 3, side, side, dtype=torch.float64)
    if unlike := _kinds(model) - _kinds(made):
        raise NoSpecimen(f"a copy by its name lacks {', '.join(sorted(kind for kind, _ in unlike))}")
    with torch.no_grad():
        normalise(made, lambda: made(images))
        if not _tensor(made(images)).isfinite().all():
            raise NoSpecimen("its random copy computes no finite numbers")
    return Specimen(made, {"images": lambda: _tensor(made(images))})


def _kinds(model: nn.Module) -> set[tuple[str, frozenset[str]]]:
    """Classes of modules, with the names of their children; those of lists are numbers."""
    named = ((type(module).__name__, module._modules) for module in model.modules())
    return {(kind, frozenset(children)) for kind, children in named if children and not any(map(str.isdigit, children))}


def _calm(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _tensor(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return torch.cat([_tensor(part).flatten() for part in (result.values() if isinstance(result, dict) else result)])
