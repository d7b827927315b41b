"""BEFT: conformance, and PEFT's numbers from the same vectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adapterkit_peft_types.beft import BEFT
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestConformance(AdapterConformance):
    config = BEFT()


def test_it_is_that_of_peft(same_as_peft: Callable[..., None]) -> None:
    peft = pytest.importorskip("peft")

    def copied(module: ak.AdapterModule, layer: nn.Module) -> None:
        module.bias.data.copy_(layer.beft_bias["default"].data[0])  # type: ignore[union-attr,operator,index]

    theirs = peft.BeftConfig(target_modules=["first", "last"])
    same_as_peft(BEFT(targets="path:first path:last"), theirs, copied)


def test_a_layer_without_a_bias_takes_one_when_merged() -> None:
    """PEFT cannot merge there."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    adapters = ak.Adapters(model)
    adapters.add("a", BEFT(targets="*"))
    [module] = adapters.modules("a").values()
    module.bias.data.fill_(2.0)  # type: ignore[union-attr,operator]
    assert torch.equal(model(torch.zeros(1, 4)), torch.full((1, 3), 2.0))
    with adapters.merged():
        assert torch.equal(model[0].bias, torch.full((3,), 2.0))  # type: ignore[arg-type]
    assert model[0].bias is None


def test_a_convolution_and_what_has_no_bias_to_change() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    x = torch.randn(1, 2, 5, 5)
    before = model(x)
    adapters = ak.Adapters(model)
    adapters.add("a", BEFT(targets="*"))
    [module] = adapters.modules("a").values()
    module.bias.data.copy_(torch.tensor([1.0, 2.0, 3.0]))  # type: ignore[union-attr,operator]
    assert torch.allclose(model(x) - before, torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1).expand_as(before))
    with pytest.raises(errors.IncompatibleTargetError, match="embedding"):
        ak.Adapters(nn.Sequential(nn.Embedding(5, 3))).add("a", BEFT(targets="*"))
