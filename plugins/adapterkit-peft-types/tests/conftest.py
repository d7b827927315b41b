"""A tiny model, and the comparison of a type with the installed PEFT's: outputs, and the weights after a merge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import adapterkit_peft_types
import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.plugins.manager import get_plugin_manager
from adapterkit.torchvision_ops import ensure_torchvision_ops


class Toy(nn.Module):
    """Linear layers of several shapes, with and without a bias, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)
        self.conv, self.last = nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu()).relu().unflatten(-1, (3, 2, 2))
        return self.last(self.conv(hidden).flatten(-3))


def close(ours: Tensor, theirs: Tensor) -> bool:
    return (ours - theirs).abs().max().item() <= 1e-5 * theirs.abs().max().item()


@pytest.fixture
def same_as_peft() -> Callable[..., None]:
    """Gives PEFT's random tensors to ours, module by module, and asks for the same outputs and weights."""
    ensure_torchvision_ops()
    peft = pytest.importorskip("peft")

    def compare(
        config: ak.AdapterConfig,
        theirs: Any,
        copied: Callable[[ak.AdapterModule, Any], None],
        base: nn.Module | None = None,
        x: Tensor | None = None,
        std: float = 0.3,
    ) -> None:
        base = (base or Toy()).eval()
        plain = copy.deepcopy(base)
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)) if x is None else x
        model = peft.get_peft_model(copy.deepcopy(base), theirs).eval()
        for name, parameter in model.named_parameters():
            if "default" in name:
                parameter.data += std * torch.randn(parameter.shape)
        adapters = ak.Adapters(base)
        adapters.add("a", config)
        paths = {point.id: point.path for point in adapters.points()}
        for key, module in adapters.modules("a").items():
            copied(module, model.base_model.model.get_submodule(paths[key]))
        with torch.no_grad():
            expected = model(x)
            assert not close(plain(x), expected)
            assert close(base(x), expected)
            merged = model.merge_and_unload()
            with adapters.merged():
                assert close(base(x), expected)
                for path in paths.values():
                    assert close(base.get_parameter(f"{path}.weight"), merged.get_parameter(f"{path}.weight"))

    return compare


@pytest.fixture(autouse=True, scope="session")
def registered() -> None:
    """The package's types and codecs have names, also where it lies beside without being installed."""
    ensure_torchvision_ops()
    manager = get_plugin_manager()
    if "hra" not in manager.adapters():
        manager.register(adapterkit_peft_types, name="peft_types")
