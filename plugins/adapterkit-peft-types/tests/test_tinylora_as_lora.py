"""TinyLoRA in files that have no words for it: its numbers are found by the point that it is at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapterkit_peft_types.tinylora import TinyLoRA
from torch import nn

import adapterkit as ak


@pytest.mark.parametrize("format", ["lycoris", "kohya"])
def test_it_is_written_as_lora(tmp_path: Path, format: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    adapters = ak.Adapters(model)
    adapters.add("tiny", TinyLoRA("all", rank=2))
    with torch.no_grad():
        for parameter in adapters.parameters("tiny"):
            parameter.normal_()
    x = torch.randn(5, 4)
    expected = model(x)
    adapters.save("tiny", tmp_path / "it", format=format)
    assert adapters.load(tmp_path / "it", "back").type == "lora"
    adapters.activate("back")
    torch.testing.assert_close(model(x), expected)
