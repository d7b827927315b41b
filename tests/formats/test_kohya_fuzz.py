"""Whatever is done to a file of the UIs, a load works or ends in a typed error, and the model stays as it was.

Such files have no checksum: what is changed in a tensor's bytes is another adapter, if its numbers are finite.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

import adapterkit as ak
from tests.formats.test_fuzz import COUNT, Target, cut, edit_text, flip, overwrite, repeat


class Scripts(Target):
    def __init__(self, folder: Path, format: str) -> None:
        self.model, self.path = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(2, 3, 3)), folder / "fuzzed.safetensors"
        self.adapters = ak.Adapters(self.model)
        self.adapters.add("good", ak.LoRA("all", rank=2, alpha=3.0))
        with torch.no_grad():
            for parameter in self.adapters.parameters("good"):
                parameter.normal_()
        self.good = self.adapters.save("good", self.path, format=format).read_bytes()
        self.adapters.detach()
        self.paths: set[object] = set()
        self.before, self.types = self._state(), self._types()


@pytest.mark.parametrize("count", COUNT)
@pytest.mark.parametrize("format", ["kohya", "comfy"])
def test_mutated_bytes(format: str, count: int, tmp_path: Path) -> None:
    target, chance = Scripts(tmp_path, format), random.Random(11)
    assert target.load(target.good)
    for _ in range(count):
        data = bytearray(target.good)
        chance.choice((flip, overwrite, cut, repeat, edit_text))(data, chance)
        target.load(bytes(data))
    target.check()
