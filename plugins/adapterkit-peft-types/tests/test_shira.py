"""SHiRA: conformance, its places, and PEFT's numbers from the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adapterkit_peft_types.shira import SHiRA
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestConformance(AdapterConformance):
    config = SHiRA(rank=1)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("rank", "seed"), [(1, 5), (3, 0)])
def test_it_is_that_of_peft(same_as_peft: Callable[..., None], rank: int, seed: int) -> None:
    """The places too, from a seed."""
    peft = pytest.importorskip("peft")

    def copied(module: ak.AdapterModule, layer: nn.Module) -> None:
        assert torch.equal(module.get_buffer("indices"), layer.shira_indices["default"])  # type: ignore[index]
        module.values.data.copy_(layer.shira_weight["default"].data)  # type: ignore[union-attr,operator,index]

    theirs = peft.ShiraConfig(r=rank, random_seed=seed, target_modules=["first", "second"])
    same_as_peft(SHiRA(rank=rank, seed=seed, targets="path:first path:second"), theirs, copied)


def test_it_has_as_many_numbers_as_lora_at_different_places() -> None:
    adapters = ak.Adapters(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Embedding(20, 30)))
    assert adapters.add("a", SHiRA(rank=2, targets="*")).parameters == 2 * (5 + 27) + 2 * (20 + 30)
    adapters.add("b", SHiRA(rank=2, targets="*"), seed=1)
    both = [[each.get_buffer("indices") for each in adapters.modules(name).values()] for name in "ab"]
    for own, other in zip(*both, strict=True):
        assert len(own.T.unique(dim=0)) == own.shape[1]
        assert not torch.equal(own, other)


def test_what_cannot_be() -> None:
    for options in ({"rank": 0}, {"seed": -1}):
        with pytest.raises(errors.ConfigError, match=next(iter(options))):
            SHiRA(**options)
    with pytest.raises(errors.IncompatibleTargetError, match="set rank to 4 at most"):
        ak.Adapters(nn.Sequential(nn.Linear(12, 8))).add("a", SHiRA(rank=5, targets="*"))
