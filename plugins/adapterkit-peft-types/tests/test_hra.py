"""HRA: conformance, its equation, and PEFT's numbers from the same vectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adapterkit_peft_types.hra import HRA
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


class TestConformance(AdapterConformance):
    config = HRA(rank=4)


@pytest.mark.slow
class TestOrthogonal(AdapterConformance):
    config = HRA(rank=3, gram_schmidt=True)


@pytest.mark.filterwarnings("ignore:The symmetric initialization")
@pytest.mark.parametrize(("rank", "orthogonal"), [(4, False), (3, False), (1, False), (3, True)])
def test_it_is_that_of_peft(same_as_peft: Callable[..., None], rank: int, orthogonal: bool) -> None:
    peft = pytest.importorskip("peft")

    class Square(nn.Module):
        """PEFT pads and strides a convolution alike along all axes, without dilation."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.conv = nn.Linear(12, 16), nn.Conv2d(4, 6, 3, padding=1, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.first(x).relu().unflatten(-1, (4, 2, 2)))

    def copied(module: ak.AdapterModule, layer: nn.Module) -> None:
        module.u.data.copy_(layer.hra_u["default"].data)  # type: ignore[union-attr,operator,index]

    theirs = peft.HRAConfig(r=rank, apply_GS=orthogonal, target_modules=["first", "conv"])
    same_as_peft(HRA(rank=rank, gram_schmidt=orthogonal, targets="*"), theirs, copied, Square())


def test_reflections_come_one_after_the_other() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).double()
    adapters = ak.Adapters(model)
    adapters.add("a", HRA(rank=3, targets="*"))
    [module] = adapters.modules("a").values()
    expected = model[0].weight.detach().clone()
    for u in module.get_parameter("u").detach().T:
        expected = expected @ (torch.eye(6, dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u))
    merged, _ = module.merged(model[0].weight.detach(), None)  # type: ignore[arg-type]
    assert torch.allclose(merged, expected, rtol=1e-12, atol=1e-12)


def test_a_grouped_dilated_convolution() -> None:
    """PEFT refuses groups, and computes without dilation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, dilation=2, padding_mode="reflect", padding=1)).double()
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    adapters = ak.Adapters(model)
    adapters.add("a", HRA(rank=3, targets="*"))
    y = model(x)
    with adapters.merged():
        assert torch.allclose(model(x), y, rtol=1e-10, atol=1e-10)


def test_what_cannot_be() -> None:
    with pytest.raises(errors.ConfigError, match="rank"):
        HRA(rank=0)
    with pytest.raises(errors.IncompatibleTargetError, match="7 orthogonal"):
        ak.Adapters(nn.Sequential(nn.Linear(6, 4))).add("a", HRA(rank=7, gram_schmidt=True, targets="*"))
    with pytest.raises(errors.IncompatibleTargetError, match="embedding"):
        ak.Adapters(nn.Sequential(nn.Embedding(6, 4))).add("a", HRA(targets="*"))
