"""Adapter files that other tools wrote, with what the tools computed from them.

A few stand in `tests/data/foreign`; all of them lie where `ADAPTERKIT_FIXTURES` says, or beside the checkout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit as ak

HERE = Path(__file__).parents[1] / "data" / "foreign"
ELSEWHERE = Path(os.environ.get("ADAPTERKIT_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures"))


def named(prefix: str, folder: Path = ELSEWHERE) -> list[str]:
    """The fixtures in a folder whose names begin so."""
    return sorted(path.name for path in folder.glob(f"{prefix}*")) if folder.is_dir() else []


def read(path: Path) -> Any:
    return json.loads(path.read_text())


class Fixture:
    """One fixture: the base, what the tool wrote, and what it computed."""

    def __init__(self, name: str, folder: Path) -> None:
        self.path, self.folder = folder / name, folder
        if not self.path.is_dir():
            pytest.skip(f"{self.path} is not here: set ADAPTERKIT_FIXTURES to the folder of fixtures")
        self.about = read(self.path / "about.json")
        self.spec = read(self.path / "model.json")["components"]["model"]
        self.inputs = load_file(str(self.path / "inputs.safetensors"))
        expected = load_file(str(self.path / "expected.safetensors"))
        kind = self.about.get("expect", "out")
        self.expected = {key.split("/")[-1]: value for key, value in expected.items() if key.startswith(f"{kind}/")}
        self.tolerance = self.about["tolerance"]["outputs_relative_to_max"]

    def model(self) -> nn.Module:
        """The base of one of transformers' classes."""
        import transformers

        path = self.folder / "bases" / self.spec["base"]
        cls = getattr(transformers, read(path / "base.json")["class"])
        return cls.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """What the model gives for the fixture's inputs."""
        out = model(**{name: self.inputs[f"model/{name}"] for name in self.spec["inputs"]})
        return {name: getattr(out, name) for name in self.spec["outputs"]}

    def load(self, adapters: ak.Adapters, **options: Any) -> Any:
        """Loads what the fixture holds; returns what is to be activated."""
        given = self.about["load"]
        if isinstance(given, str):
            adapters.load(self.path / given, "tiny", allow_pickle=True, **options)
            return "tiny"
        for name, path in given["parts"].items():
            adapters.load(self.path / path, name, allow_pickle=True, **options)
        if "fusion" not in given:
            return ak.Stack(*given["parts"])
        adapters.load(self.path / given["fusion"], "fusion", allow_pickle=True, **options)
        return "fusion"

    def error(self, model: nn.Module, rows: slice = slice(None)) -> float:
        """The largest difference from what the tool gave, over its largest value."""
        worst = 0.0
        for name, got in self.outputs(model).items():
            expected = self.expected[name][:, -got.shape[1] :] if got.ndim == 3 else self.expected[name]
            assert got.shape == expected.shape
            worst = max(worst, float((got - expected)[rows].abs().max() / expected.abs().max()))
        return worst


def check(fixture: Fixture, change: Callable[[ak.Adapters], Any] | None = None, **options: Any) -> None:
    """Loads a fixture, and compares what the model then gives."""
    model = fixture.model()
    adapters = ak.Adapters(model)
    adapters.activate(fixture.load(adapters, **options))
    assert fixture.error(model) <= fixture.tolerance
