"""RoAd: conformance in its variants, and PEFT's numbers from the same angles."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from adapterkit_peft_types.road import RoAd
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestPairs(AdapterConformance):
    config = RoAd()


@pytest.mark.slow
class TestFeatures(AdapterConformance):
    config = RoAd(variant=2, group=2)


@pytest.mark.slow
class TestNumbers(AdapterConformance):
    config = RoAd(variant=4, group=2)


@pytest.mark.parametrize(("variant", "group"), [(1, 4), (1, 2), (2, 4), (4, 4), (4, 2)])
def test_it_is_that_of_peft(same_as_peft: Callable[..., None], variant: int, group: int) -> None:
    peft = pytest.importorskip("peft")

    def copied(module: ak.AdapterModule, layer: nn.Module) -> None:
        for name in ("theta", "alpha"):
            module.get_parameter(name).data.copy_(getattr(layer, f"road_{name}")["default"].data)

    theirs = peft.RoadConfig(variant=f"road_{variant}", group_size=group, target_modules=["first", "second"])
    same_as_peft(RoAd(variant=variant, group=group, targets="path:first path:second"), theirs, copied)


def test_a_quarter_turn() -> None:
    model = nn.Sequential(nn.Linear(2, 4)).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    before = model(x)
    adapters = ak.Adapters(model)
    adapters.add("a", RoAd(targets="*"))
    [module] = adapters.modules("a").values()
    module.theta.data.copy_(torch.tensor([math.pi / 2, 0.0]))  # type: ignore[union-attr,operator]
    module.alpha.data.copy_(torch.tensor([2.0, 1.0]))  # type: ignore[union-attr,operator]
    expected = torch.stack((-2 * before[:, 2], before[:, 1], 2 * before[:, 0], before[:, 3]), -1)
    assert torch.allclose(model(x), expected)


def test_channels_of_a_grouped_convolution_stay_in_their_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    adapters = ak.Adapters(model)
    adapters.add("a", RoAd(variant=4, targets="*"))
    [module] = adapters.modules("a").values()
    assert module.group == 4
    for parameter in module.parameters():
        parameter.data.normal_()
    y = model(x)
    with adapters.merged():
        assert torch.allclose(model(x), y, rtol=1e-10, atol=1e-10)
    with pytest.raises(errors.IncompatibleTargetError, match="group 8"):
        ak.Adapters(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))).add("a", RoAd(group=8, targets="*"))


@pytest.mark.parametrize("options", [{"variant": 3}, {"group": 3}, {"group": 0}])
def test_wrong_values(options: dict[str, int]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        RoAd(**options)
