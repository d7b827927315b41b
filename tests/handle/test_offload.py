"""accelerate's offload hooks around a model that has adapters: parameters are on the meta device between calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_an_adapter_acts_under_offload_hooks_at_every_weight(weight: float, tmp_path: Path) -> None:
    model, x = layers(), torch.randn(3, 4)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_()
    adapters.activate({"a": weight})
    y = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.allclose(model(x), y, atol=1e-6)
    with pytest.raises(errors.NotMergeableError, match="offloaded"):
        adapters.merge()
    with pytest.raises(errors.StateError, match="offloaded"):
        adapters.save("a", tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_sublayer_whose_layers_are_offloaded_takes_no_adapter() -> None:
    """Its own forward is the class's: the hooks are on the layers inside."""
    toys.register()
    model = toys.ToyModel().eval()
    for name in ("up", "down"):
        cpu_offload(model.blocks[0].get_submodule(name), execution_device=torch.device("cpu"))
    assert "forward" not in model.blocks[0].mlp.__dict__
    adapters = ak.Adapters(model)
    with pytest.raises(errors.AttachError, match="before such hooks"):
        adapters.add("a", ak.Bottleneck(width=2, targets="mlp"))
    assert not len(adapters)


def test_an_offloaded_model_takes_no_adapter() -> None:
    model = layers()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(errors.AttachError, match="before such hooks"):
        ak.Adapters(model).add("a", ak.LoRA(targets="*"))
