"""Prefixes with weights, where the model has no mask and where it has one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.testing import families, models, toys
from tests.values import randomize


@pytest.mark.parametrize("make", [models.ToyVision, toys.ToyModel], ids=["no mask", "causal"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.25, 0.75)])
def test_shares_of_a_prefix_are_the_prefix(make: type[nn.Module], weights: tuple[float, float]) -> None:
    """A weight multiplies a prefix's terms in the softmax: of two copies, w and 1 - w are the one."""
    families.register()
    model = make().double().eval().requires_grad_(False)
    x = toys.ids() if make is toys.ToyModel else torch.randn(2, 3, models.IMAGE, models.IMAGE, dtype=torch.float64)
    adapters = ak.Adapters(model)
    for name in ("one", "other"):
        adapters.add(name, ak.Prefix(length=2))
        randomize(adapters, name)
    with adapters.disabled():
        base = model(x)
    with adapters.activated("one"):
        expected = model(x)
    with adapters.activated(dict(zip(("one", "other"), weights, strict=True))):
        assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(base, expected, rtol=1e-3)
