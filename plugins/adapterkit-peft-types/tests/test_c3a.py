"""C3A: conformance, its equation, and PEFT's numbers from the same kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adapterkit_peft_types.c3a import C3A
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestConformance(AdapterConformance):
    config = C3A(block=4)


@pytest.mark.parametrize("block", [1, 2, 4, 3])
def test_it_is_that_of_peft(same_as_peft: Callable[..., None], block: int) -> None:
    peft = pytest.importorskip("peft")

    def copied(module: ak.AdapterModule, layer: nn.Module) -> None:
        module.kernel.data.copy_(layer.c3a_kernel["default"].data)  # type: ignore[union-attr,operator,index]

    names = ["last"] if block == 3 else ["first", "second"]
    theirs = peft.C3AConfig(block_size=block, target_modules=names)
    same_as_peft(C3A(block=block, targets=" ".join(f"path:{name}" for name in names)), theirs, copied, std=3.0)


def test_a_block_is_circulant() -> None:
    adapters = ak.Adapters(nn.Sequential(nn.Linear(3, 3)).double())
    adapters.add("a", C3A(targets="*"))
    [module] = adapters.modules("a").values()
    module.kernel.data.copy_(torch.tensor([[[3.0, 6.0, 9.0]]]))  # type: ignore[union-attr,operator]
    rows = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(module.delta_weight(), rows)  # type: ignore[operator]


@pytest.mark.parametrize("start", ["gaussian", "kaiming_uniform", "xavier_uniform"])
def test_starts_are_within_their_bounds(start: str) -> None:
    adapters = ak.Adapters(nn.Sequential(nn.Linear(64, 32)))
    adapters.add("a", C3A(start=start, targets="*"))
    [module] = adapters.modules("a").values()
    kernel = module.get_parameter("kernel")
    bound = {"gaussian": 10.0, "kaiming_uniform": 1 / 8, "xavier_uniform": 1 / 4}[start]
    assert bound * 0.05 < kernel.abs().max() <= bound
    assert not C3A(start=start).neutral


def test_what_cannot_be() -> None:
    for options in ({"block": 0}, {"start": "ones"}):
        with pytest.raises(errors.ConfigError, match=next(iter(options))):
            C3A(**options)  # type: ignore[arg-type]
    with pytest.raises(errors.IncompatibleTargetError, match="set it to 6"):
        ak.Adapters(nn.Sequential(nn.Linear(12, 18))).add("a", C3A(block=4, targets="*"))
