"""What a specimen is, and which module makes one of a model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # what timm's norms with an activation derive from

from adapterkit.errors import NoSpecimen

_SEED = 0
_SPREAD = 0.1
_MAKERS = {
    "transformers": ("pictures", "texts"),
    "timm": ("timm_models",),
    "diffusers": ("diffusers_models",),
}
"""Library of a model's class -> the modules here that make specimens of it, asked in this order."""


@dataclass(frozen=True)
class Specimen:
    """A shrunk random copy of a model, and what to run it on.

    Attributes:
        model: In float64 and evaluation mode, without grad or dropout; no weight is zero, no gain one.
        calls: Label -> runs a model of this shape on fixed inputs, and gives one tensor of all that it returns.
            Together they run every part of the model.
    """

    model: nn.Module
    calls: Mapping[str, Callable[[], Tensor]]


def specimen(model: nn.Module) -> Specimen:
    """A specimen of a model, or of its skeleton on the meta device, of whose values nothing is read.

    Raises:
        NoSpecimen: It is of a library that none is made of, or of an architecture that cannot be shrunk or run here.
    """
    reasons = [f"{type(model).__name__} is of no library that specimens are made of ({', '.join(_MAKERS)})"]
    for name in _makers(model):
        made = importlib.import_module(f"adapterkit.testing.specimens.{name}")
        try:
            return made.specimen_of(model)
        except NoSpecimen as error:
            reasons.append(error.reason)
    raise NoSpecimen("; ".join(reasons[1:] or reasons))


def _makers(model: nn.Module) -> tuple[str, ...]:
    """The modules for the library of a model's class, or of the nearest class that it derives from."""
    libraries = (cls.__module__.partition(".")[0] for cls in type(model).__mro__)
    return next((_MAKERS[library] for library in libraries if library in _MAKERS), ())


def strengthened(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode, with noise of 0.1 added to every parameter.

    Biases begin as zeros, gains as ones and the gates of diffusion transformers as zeros: a claim about such a weight
    would hold whatever the model does with it. The noise is the same each time.
    """
    model.double().eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(_SEED)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=_SPREAD)
    return model


@torch.no_grad()
def normalise(model: nn.Module, run: Callable[[], object]) -> None:
    """Gives batch norms the statistics of a run: without, random convolutions make numbers ever larger, or smaller.

    What a layer computes would be lost in what others do, and no claim about it could be told from another.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        run()
    for norm, momentum in zip(norms, kept, strict=True):
        norm.eval()
        norm.momentum = momentum
