"""What all points of an adapter share is registered once, so that whatever saves a model's state takes it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

import adapterkit as ak
from adapterkit.testing import toys
from tests.values import randomize

CONFIGS = {
    "compacter": ak.Compacter(n=2),
    "invertible": ak.Invertible(),
    "apart": ak.Union((ak.Compacter(n=2, targets="mlp@layer=1"), ak.Invertible())),
    "several": ak.Union((ak.Compacter(n=2, targets="mlp"), ak.LoRA(rank=1, targets="attn.o"), ak.Invertible())),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(autouse=True)
def _toys() -> None:
    toys.register()


def adapted(config: ak.AdapterConfig) -> tuple[nn.Module, ak.Adapters]:
    model = toys.ToyModel().eval()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomize(adapters, "a")
    return model, adapters


@each
def test_a_model_s_state_names_it_once(config: ak.AdapterConfig, tmp_path: Path) -> None:
    model, adapters = adapted(config)
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict().items():
        if ".adapterkit." in name:
            names.setdefault(tensor.data_ptr(), []).append(name)
    assert [found for found in names.values() if len(found) > 1] == []
    assert sum(".shared." in name for found in names.values() for name in found) > 0
    save_model(model, str(tmp_path / "model.safetensors"))
    other, _ = adapted(config)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(toys.ids()), model(toys.ids()))
    assert len(list(adapters.parameters())) == len({id(p) for p in adapters.parameters()})


@each
def test_all_points_see_one_thing_in_copies_and_files_too(config: ak.AdapterConfig, tmp_path: Path) -> None:
    model, adapters = adapted(config)
    y = model(toys.ids())
    adapters.load(adapters.save("a", tmp_path / "a"), "b")
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    found = {id(module.shared) for module in adapters.modules("b").values()}
    assert len(found) == 1
    adapters.activate("b")
    assert torch.equal(model(toys.ids()), y)
    ak.Adapters(model).detach()
    for twin in twins:
        handle = ak.Adapters(twin)
        assert len({id(module.shared) for module in handle.modules("a").values()}) == 1
        twin.double().float()
        assert torch.equal(twin(toys.ids()), y)
        handle.detach()


def test_each_model_of_a_pipeline_has_it_once() -> None:
    """One of them may be saved, or moved, without the other."""
    parts = {"one": toys.ToyModel(), "two": toys.ToyModel()}
    adapters = ak.Adapters(SimpleNamespace(components=parts))
    adapters.add("a", ak.Compacter(n=2))
    for part in parts.values():
        assert sum(name.endswith(".shared.rule") for name in part.state_dict()) == 1
    modules: list[Any] = list(adapters.modules("a").values())
    assert len({id(module.shared) for module in modules}) == 1
    assert sum(key.startswith("shared/") for key in adapters.state_dict("a")) == 1
