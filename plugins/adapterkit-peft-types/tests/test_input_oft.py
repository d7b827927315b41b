"""InputOFT: conformance, its equation, and PEFT's numbers from the same parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterkit_peft_types.input_oft import InputOFT
from safetensors.torch import save_file
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


class TestConformance(AdapterConformance):
    config = InputOFT(block=2)


@pytest.mark.filterwarnings("ignore:Invalid")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_cayley_neumann_terms": 2},
        {"num_cayley_neumann_terms": 7},
        {"use_cayley_neumann": False},
        {"block_share": True},
        {"coft": True, "eps": 0.05},
    ],
)
def test_it_is_that_of_peft(same_as_peft: Callable[..., None], options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.conv = nn.Linear(12, 16), nn.Conv2d(4, 6, 1, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.first(x).relu().unflatten(-1, (4, 2, 2)))

    def copied(module: ak.AdapterModule, layer: nn.Module) -> None:
        module.weight.data.copy_(layer.oft_R["default"].weight.data)  # type: ignore[union-attr,operator,index]

    config = InputOFT(
        "*",
        block=4,
        terms=options.get("num_cayley_neumann_terms", 5) if options.get("use_cayley_neumann", True) else None,
        shared_blocks=options.get("block_share", False),
        constraint=options.get("eps"),
    )
    theirs = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["first", "conv"], **options)
    same_as_peft(config, theirs, copied, Net())


def test_patches_are_asked_for_and_do_not_merge() -> None:
    adapters = ak.Adapters(nn.Sequential(nn.Conv2d(2, 3, 2)))
    with pytest.raises(errors.IncompatibleTargetError, match="patches=True"):
        adapters.add("a", InputOFT("*", block=2))
    adapters.add("a", InputOFT("*", block=2, patches=True))
    with pytest.raises(errors.NotMergeableError, match="no equivalent weight"):
        adapters.merge("a")


@pytest.mark.parametrize(
    ("fields", "shapes"),
    [
        ({"r": 4, "oft_block_size": 0}, {"0": (4, 1), "1": (4, 6)}),
        ({"r": 0, "oft_block_size": 4}, {"0": (2, 6), "1": (4, 6)}),
    ],
)
def test_a_file_says_the_size_of_blocks_or_their_number(
    tmp_path: Path, fields: dict[str, int], shapes: dict[str, tuple[int, int]]
) -> None:
    """PEFT's config has one of them for all layers: where widths differ, the one that is the same."""
    adapters = ak.Adapters(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 12)))
    keys = {f"base_model.model.{path}.oft_R.weight": torch.randn(shape) for path, shape in shapes.items()}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", **fields}))
    save_file(keys, str(tmp_path / "a" / "adapter_model.safetensors"))
    adapters.load(tmp_path / "a")
    adapters.save("a", tmp_path / "b", format="peft")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text()).items() >= fields.items()
