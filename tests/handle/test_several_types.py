"""One adapter of several types, each at points of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adapterkit as ak
from adapterkit.adapters.trainable import Trainable
from adapterkit.errors import ConfigError
from adapterkit.testing import toys


def test_several_configs_make_one_adapter_that_is_saved_and_comes_back(tmp_path: Path) -> None:
    toys.register()
    model, other = toys.ToyModel().eval(), toys.ToyModel().eval()
    tokens = toys.ids(2, 5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapters = ak.Adapters(model)
    adapters.add("a", [ak.LoRA(rank=2, targets="attn.*"), Trainable("head")])
    assert {key.partition("@")[0] for key in adapters.modules("a")} == {"attn.q", "attn.k", "attn.v", "attn.o", "head"}
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected = model(tokens)
    adapters.save("a", tmp_path / "a.safetensors")
    there = ak.Adapters(other)
    assert there.load(tmp_path / "a.safetensors", "b").type == "lora + trainable"
    there.activate("b")
    assert torch.equal(other(tokens), expected)
    adapters.detach()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_types_of_one_adapter_have_points_of_their_own() -> None:
    toys.register()
    adapters = ak.Adapters(toys.ToyModel())
    with pytest.raises(ConfigError, match=r"LoRA and Trainable both are for attn\.q@toy\.0.*narrow targets"):
        adapters.add("a", [ak.LoRA(rank=2, targets="attn.*"), Trainable("attn.q")])
    with pytest.raises(ConfigError, match=r"expected an AdapterConfig such as LoRA\(rank=8\), not \[\]"):
        adapters.add("a", [])
    with pytest.raises(ConfigError, match="settings are of one config"):
        adapters.add("a", [ak.LoRA(rank=2, targets="attn.*"), Trainable("head")], settings={"attn.q@toy.0": {}})
    assert list(adapters) == []
