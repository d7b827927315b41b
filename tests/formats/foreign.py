"""Adapter files that other tools wrote, with what the tools computed from them.

A few stand in `tests/data/foreign`; all of them lie where `ADAPTERKIT_FIXTURES` says, or beside the checkout.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit as ak

HERE = Path(__file__).parents[1] / "data" / "foreign"
ELSEWHERE = Path(os.environ.get("ADAPTERKIT_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures"))

_ROUNDING = 4e-7
"""What a float32 weight loses when something is added to it, relative."""
_FROM_THE_BASE = 4
"""How many times the error of the base may come back with an adapter on it: another CPU sums in another order."""


def named(prefix: str = "", folder: Path = ELSEWHERE) -> list[str]:
    """The fixtures in a folder whose names begin so."""
    return sorted(path.parent.name for path in folder.glob(f"{prefix}*/about.json"))


def few() -> list[tuple[str, Path]]:
    """Those in the repository: name and folder."""
    return [(name, folder) for folder in sorted(HERE.glob("*")) for name in named(folder=folder)]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


class Fixture:
    """One fixture: the base, what the tool wrote, and what it computed."""

    def __init__(self, name: str, folder: Path) -> None:
        self.path, self.folder = folder / name, folder
        if not self.path.is_dir():
            pytest.skip(f"{self.path} is not here: set ADAPTERKIT_FIXTURES to the folder of fixtures")
        self.about = read(self.path / "about.json")
        every = read(self.path / "model.json")["components"]
        self.components = {name: one for name, one in every.items() if (folder / "bases" / one["base"]).is_dir()}
        self.inputs = load_file(str(self.path / "inputs.safetensors"))
        self.stored = load_file(str(self.path / "expected.safetensors"))
        self.expected = self._stored("reloaded" if self.about.get("expect") == "reloaded" else "out")
        self.tolerance: float = self.about["tolerance"]["outputs_relative_to_max"]

    def _stored(self, kind: str) -> dict[str, Tensor]:
        parts = (key.split("/", 2) for key in self.stored)
        return {
            f"{part}/{name}": self.stored[f"{own}/{part}/{name}"]
            for own, part, name in parts
            if own == kind and part in self.components
        }

    def parts(self) -> dict[str, nn.Module]:
        """The components of the base."""
        return {name: built(self.folder, spec["base"]) for name, spec in self.components.items()}

    def model(self) -> Any:
        """The base: a model, or a pipeline of several."""
        parts = self.parts()
        return parts["model"] if set(parts) == {"model"} else SimpleNamespace(components=parts)

    @torch.no_grad()
    def outputs(self, model: Any) -> dict[str, Tensor]:
        """What the model gives for the fixture's inputs, as `component/output`."""
        parts = getattr(model, "components", None) or {"model": model}
        return {key: value for name in self.components for key, value in self._called(name, parts[name]).items()}

    def _called(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        spec = self.components[name]
        given: dict[str, Any] = {one: self.inputs[f"{name}/{one}"] for one in spec["inputs"]}
        if "added_cond_kwargs" in spec:
            given["added_cond_kwargs"] = {one: self.inputs[f"{name}/{one}"] for one in spec["added_cond_kwargs"]}
        out = module(**given)
        values = {one: out if one == "output" else getattr(out, one) for one in spec["outputs"]}
        return {f"{name}/{one}": value[0] if isinstance(value, tuple) else value for one, value in values.items()}

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

    def error(self, model: Any, rows: slice = slice(None)) -> float:
        """The largest difference from what the tool gave, over its largest value."""
        return _worst(self.outputs(model), self.expected, rows)

    def base_error(self, model: Any) -> float:
        """The same of the base, before anything is loaded."""
        return _worst(self.outputs(model), self._stored("base"))

    def changes(self) -> dict[tuple[str, str], Tensor]:
        """(component, parameter) -> what the tool adds to it, where the fixture tells."""
        return {tuple(key.split("/", 1)): value for key, value in self._stored("delta").items()}  # type: ignore[misc]

    def change_errors(self, parts: Mapping[str, nn.Module]) -> list[str]:
        """The parameters of a merged model that have changed otherwise than the tool says."""
        before, after = (
            {n: dict(m.named_parameters(remove_duplicate=False)) for n, m in own.items()}
            for own in (self.parts(), parts)
        )
        wrong: list[str] = []
        for (name, path), change in self.changes().items():
            now, was = after[name].get(path), before[name].get(path, torch.zeros(()))
            largest = float(change.abs().max().clamp_min(1e-30))
            rounding = _ROUNDING * float(was.abs().max()) / largest
            allowed = max(self.about["tolerance"]["delta_relative_to_max"], rounding)
            if now is None or float((now.double() - was.double() - change.double()).abs().max()) > allowed * largest:
                wrong.append(f"{name}/{path}")
        return wrong


def _worst(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], rows: slice = slice(None)) -> float:
    worst = 0.0
    for name, want in expected.items():
        mine = got[name]
        if mine.ndim == 3:  # one of the two counts the positions of a prompt
            length = min(mine.shape[1], want.shape[1])
            mine, want = mine[:, -length:], want[:, -length:]
        assert mine.shape == want.shape
        worst = max(worst, float((mine.double() - want.double())[rows].abs().max() / want.abs().max()))
    return worst


def built(folder: Path, name: str) -> nn.Module:
    """One of the bases that fixtures share."""
    path = folder / "bases" / name
    info = read(path / "base.json")
    library, cls, kwargs = info["library"], info["class"], info.get("kwargs", {})
    if library in ("transformers", "diffusers"):
        given = {"dtype": torch.float32} if library == "transformers" else {"low_cpu_mem_usage": False}
        model = getattr(importlib.import_module(library), cls).from_pretrained(path, **given)
    else:
        made = _builders(folder).build if library == "builder" else None
        model = made(cls, **kwargs) if made else getattr(_timm(info["module"]), cls)(**kwargs)
        model.load_state_dict(load_file(str(path / "model.safetensors")))
    return model.eval().requires_grad_(False)


def _timm(module: str) -> Any:
    return importlib.import_module(f"timm.models.{module}")


def _builders(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("fixture_builders", folder / "builders.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(fixture: Fixture, **options: Any) -> None:
    """Loads a fixture, and compares what the model then gives, and how its weights differ once it is merged."""
    model = fixture.model()
    allowed = fixture.tolerance + _FROM_THE_BASE * fixture.base_error(model)
    adapters = ak.Adapters(model)
    adapters.activate(fixture.load(adapters, **options))
    assert fixture.error(model) <= allowed
    if fixture.changes():
        parts = getattr(model, "components", None) or {"model": model}
        adapters.merge()
        assert fixture.change_errors(parts) == []
