"""What a module is while adapters are on it."""

from __future__ import annotations

import torch

import adapterkit as ak
from adapterkit.testing import families, models


def test_an_adapted_container_has_its_own_children_alone() -> None:
    families.register()
    model = models.ToyVision().double().eval().requires_grad_(False)  # torch rounds another way where a weight trains
    before = [list(block.mlp) for block in model.blocks]  # type: ignore[arg-type,union-attr]
    x = torch.randn(2, 3, models.IMAGE, models.IMAGE, dtype=torch.float64)
    expected = model(x)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=2, targets="mlp"))
    for block, children in zip(model.blocks, before, strict=True):
        assert list(block.mlp) == children  # type: ignore[arg-type]
        assert len(block.mlp) == len(children)  # type: ignore[arg-type]
    with adapters.disabled():
        assert torch.equal(model(x), expected)
