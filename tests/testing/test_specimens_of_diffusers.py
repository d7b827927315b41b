"""Specimens of diffusers' models: small, sound, the same each time, and every kind of block in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adapterkit.testing.specimens import NoSpecimen, specimen
from tests.architectures.catalogue import BrokenDefaultError, names, skeleton

KINDS = (
    "FluxTransformer2DModel",
    "ZImageTransformer2DModel",
    "UNetMotionModel",
)
"""Packed tokens, lists of images, a UNet of videos."""

WITHOUT = {"ControlNetXSAdapter": "its weights are copied into the model that runs them"}
"""Those that cannot be run, and why."""


def check(name: str) -> None:
    model = skeleton("diffusers", name)
    made = specimen(model)
    parameters = [*made.model.parameters()]
    assert type(made.model) is type(model)
    assert sum(parameter.numel() for parameter in parameters) < 5_000_000
    assert all(parameter.dtype == torch.float64 and parameter.any() for parameter in parameters)
    assert _kinds(made.model) >= _blocks(model)
    for call in made.calls.values():
        outcome = call()
        assert outcome.isfinite().all()
        assert torch.equal(outcome, call())
        assert outcome.std() > 1e-3


def _kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def _blocks(model: nn.Module) -> set[str]:
    """Classes of what is in lists and has attentions."""
    listed: list[Any] = [part for module in model.modules() if isinstance(module, nn.ModuleList) for part in module]
    return {type(part).__name__ for part in listed if any("Attention" in kind for kind in _kinds(part))}


@pytest.mark.parametrize("name", KINDS)
def test_a_specimen_is_small_and_runs(name: str) -> None:
    check(name)


def test_the_same_specimen_is_made_twice() -> None:
    made = [specimen(skeleton("diffusers", "Flux2Transformer2DModel")) for _ in range(2)]
    assert torch.equal(*(one.calls["forward"]() for one in made))


def test_parts_of_another_model_have_none() -> None:
    with pytest.raises(NoSpecimen, match="ControlNetXSAdapter"):
        specimen(skeleton("diffusers", "ControlNetXSAdapter"))


@pytest.mark.slow
@pytest.mark.parametrize("name", names("diffusers"))
def test_every_architecture_has_a_specimen(name: str) -> None:
    if name in WITHOUT:
        with pytest.raises(NoSpecimen):
            specimen(skeleton("diffusers", name))
        return
    try:
        check(name)
    except BrokenDefaultError as error:
        pytest.fail(str(error))
