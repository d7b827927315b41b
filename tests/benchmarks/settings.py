"""Adapters that files bring: what loading costs beside reading, and points that have settings of their own."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import adapterkit as ak
from tests.benchmarks import rivals
from tests.benchmarks.measure import Side, Timing, measure

CROWD = {"first": 0, "fiftieth": 49, "two hundredth": 199}
"""How many adapters are there already."""


def loading_many(rounds: int) -> Mapping[str, Timing]:
    """The first, 50th and 200th adapter from disk onto 224 points (hidden 64); at most 4 x the floor, a raw read."""
    base, ids = rivals.llama(hidden=64, layers=32), rivals.tokens(1, 8)
    crowds = {f"adapterkit, {name}": ak.Adapters(copy.deepcopy(base)) for name in CROWD}
    with tempfile.TemporaryDirectory() as folder:
        path = _written(base, Path(folder) / "one.safetensors", ids)
        sides = {"floor": Side(lambda _: load_file(path))}
        for (name, adapters), crowd in zip(crowds.items(), CROWD.values(), strict=True):
            for number in range(crowd):
                adapters.load(path, f"n{number}")
            sides[name] = _load(adapters, path)
        return measure(sides, rounds, warmup=1)


def _written(base: Any, path: Path, ids: torch.Tensor) -> Path:
    """A file whose adapter, loaded, gives the outputs that it gave when it was saved."""
    models = [copy.deepcopy(base), copy.deepcopy(base)]
    first, second = (ak.Adapters(model) for model in models)
    first.add("one", rivals.CONFIG)
    with torch.no_grad():
        for parameter in first.parameters("one"):
            parameter.copy_(torch.randn_like(parameter) / 16)
    second.load(first.save("one", path))
    second.activate("one")
    with torch.no_grad():
        ours, again = (model(input_ids=ids).logits for model in models)
    assert torch.equal(ours, again)
    return path


def _load(adapters: ak.Adapters, path: Path) -> Side:
    return Side(lambda _: adapters.load(path, "new"), after=lambda _: adapters.remove("new"))


def adding_settings(rounds: int) -> Mapping[str, Timing]:
    """224 points (hidden 64), each with a rank and an alpha of its own; at most 1.3 x the same without, the floor."""
    adapters = ak.Adapters(rivals.llama(hidden=64, layers=32))
    adapters.add("all", rivals.CONFIG)
    settings = {key: {"rank": 1 + i % 31, "alpha": float(i + 1)} for i, key in enumerate(adapters.modules("all"))}
    adapters.add("own", rivals.CONFIG, settings=settings)
    modules: Mapping[str, Any] = adapters.modules("own")
    assert [len(module.A) for module in modules.values()] == [own["rank"] for own in settings.values()]
    adapters.remove("own")

    def side(**options: Any) -> Side:
        return Side(lambda _: adapters.add("new", rivals.CONFIG, **options), after=lambda _: adapters.remove("new"))

    return measure({"floor": side(), "adapterkit, own settings": side(settings=settings)}, rounds, warmup=1)
