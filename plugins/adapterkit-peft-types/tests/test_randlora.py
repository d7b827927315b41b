"""RandLoRA: conformance, and PEFT's numbers from the same diagonals and from the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterkit_peft_types.randlora import RandLoRA
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestSaved(AdapterConformance):
    config = RandLoRA(rank=3, alpha=6.0)


@pytest.mark.slow
class TestDrawnAgain(AdapterConformance):
    config = RandLoRA(rank=3, alpha=6.0, save_bases=False, sparse="sparse", seed=3)


@pytest.mark.filterwarnings("ignore:Specified to not save")
@pytest.mark.parametrize("sparse", ["no", "sparse", "very_sparse"])
@pytest.mark.parametrize(("rank", "seed"), [(4, 0), (5, 7), (20, 1)])
def test_it_is_that_of_peft(same_as_peft: Callable[..., None], rank: int, seed: int, sparse: str) -> None:
    """The bases too, from the seed."""
    peft = pytest.importorskip("peft")

    def copied(module: ak.AdapterModule, layer: Any) -> None:
        for name in "AB":
            theirs = getattr(layer, f"randlora_{name}")["default"]
            assert torch.equal(module.shared.get_buffer(name), theirs.float())
        module.scale.data.copy_(layer.randlora_lambda["default"].data)  # type: ignore[union-attr,operator]
        module.gamma.data.copy_(layer.randlora_gamma["default"].data)  # type: ignore[union-attr,operator]

    theirs = peft.RandLoraConfig(
        r=rank,
        randlora_alpha=10,
        projection_prng_key=seed,
        save_projection=bool(seed),
        sparse=sparse == "sparse",
        very_sparse=sparse == "very_sparse",
        target_modules=["first", "second", "last"],
    )
    targets = "path:first path:second path:last"
    same_as_peft(RandLoRA(rank=rank, alpha=10.0, seed=seed, sparse=sparse, targets=targets), theirs, copied)


@pytest.mark.parametrize("saved", [True, False])
def test_files_hold_the_bases_or_their_seed(tmp_path: Path, saved: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).eval()
    adapters = ak.Adapters(model)
    adapters.add("a", RandLoRA(rank=32, save_bases=saved, seed=5, targets="*"))
    for parameter in adapters.parameters("a"):
        parameter.data.normal_()
    x = torch.randn(2, 64)
    y = model(x)
    path = adapters.save("a", tmp_path / "a.safetensors")
    assert (path.stat().st_size > 4 * 96 * 2 * 32) == saved
    adapters.detach()
    adapters.load(path)
    adapters.activate("a")
    assert torch.equal(model(x), y)


def test_bases_for_other_sides_are_refused() -> None:
    adapters = ak.Adapters(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    adapters.add("a", RandLoRA(rank=3, save_bases=False, targets="*"))
    checkpoint = adapters.checkpoint("a")
    wider = ak.Adapters(nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 4)))
    with pytest.raises(errors.CheckpointError):
        wider.install("a", checkpoint, strict=False)
    assert not len(wider)


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 1e9}, {"dropout": 1.0}, {"sparse": "a bit"}, {"seed": -1}])
def test_wrong_values(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        RandLoRA(**options)
