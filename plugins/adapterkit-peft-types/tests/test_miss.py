"""MiSS: conformance in its three forms, and PEFT's numbers from the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapterkit_peft_types.miss import MiSS
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestShared(AdapterConformance):
    config = MiSS(rank=3)


@pytest.mark.slow
class TestMini(AdapterConformance):
    config = MiSS(rank=2, form="mini", mini=2)


@pytest.mark.slow
class TestBat(AdapterConformance):
    config = MiSS(rank=2, form="bat")


@pytest.mark.parametrize(
    ("rank", "form", "mini"),
    [(4, "shared", 1), (5, "shared", 1), (12, "shared", 1), (4, "mini", 4), (5, "mini", 1), (4, "bat", 1)],
)
def test_it_is_that_of_peft(same_as_peft: Callable[..., None], rank: int, form: str, mini: int) -> None:
    peft = pytest.importorskip("peft")
    start: Any = True if form == "shared" else form

    def copied(module: ak.AdapterModule, layer: nn.Module) -> None:
        module.block.data.copy_(layer.miss_block["default"].data)  # type: ignore[union-attr,operator,index]

    theirs = peft.MissConfig(r=rank, init_weights=start, mini_r=mini, target_modules=["first", "second"])
    ours = MiSS(rank=rank, form=form, mini=mini, targets="path:first path:second")
    same_as_peft(ours, theirs, copied)


def test_a_convolution_is_the_matrix_of_its_weight() -> None:
    torch.manual_seed(0)
    for groups in (1, 2):
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups)).double()
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        adapters = ak.Adapters(model)
        adapters.add("a", MiSS(rank=4, targets="*"))
        [module] = adapters.modules("a").values()
        module.block.data.normal_()  # type: ignore[union-attr,operator]
        columns = torch.arange(36 // groups) % 4
        expected = module.get_parameter("block").mT[:, columns].reshape(model[0].weight.shape)  # type: ignore[arg-type]
        assert torch.equal(module.delta_weight(), expected)  # type: ignore[operator]
        y = model(x)
        with adapters.merged():
            assert torch.allclose(model(x), y, rtol=1e-10, atol=1e-10)


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    adapters = ak.Adapters(model)
    adapters.add("a", MiSS(rank=4, dropout=0.5, targets="*"))
    [module] = adapters.modules("a").values()
    module.block.data.normal_()  # type: ignore[union-attr,operator]
    x = torch.randn(2, 64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_what_cannot_be() -> None:
    for options in ({"rank": 0}, {"form": "bone"}, {"mini": 0}, {"dropout": 1.0}):
        with pytest.raises(errors.ConfigError, match=next(iter(options))):
            MiSS(**options)  # type: ignore[arg-type]
    for config, told in (
        (MiSS(rank=13, targets="*"), "fewer than rank 13"),
        (MiSS(rank=4, form="mini", mini=3, targets="*"), "mini 3"),
        (MiSS(rank=5, form="bat", targets="*"), "rank 5"),
    ):
        with pytest.raises(errors.IncompatibleTargetError, match=told):
            ak.Adapters(nn.Sequential(nn.Linear(12, 8))).add("a", config)
