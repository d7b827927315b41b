"""What an adapter type may ask of training: rates, a penalty, steps, inputs before the first step, shared modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.specs import AdapterSpec
from adapterkit.training.loop import train
from tests.training.toy_task import toy_run


class Demanding(ak.AdditiveModule):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.slow = nn.Parameter(torch.zeros(point.out_features))
        self.fast = nn.Parameter(torch.zeros(point.out_features))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def observe(self, x: Tensor) -> None:
        self.seen += 1  # type: ignore[operator,misc]

    def penalty(self) -> Tensor:
        return 1e3 * (self.slow - 1).square().sum()

    def delta(self, x: Tensor) -> Tensor:
        return (self.slow + self.fast + self.shared.row).expand(*x.shape[:-1], -1)


class Row(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(features))


@dataclass(frozen=True)
class Demands(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "attn.q"

    @property
    def observations(self) -> int:
        return 3

    def build(self, point: ak.InjectionPoint) -> Demanding:
        return Demanding(point)

    def shared(self, points: Sequence[ak.InjectionPoint]) -> nn.Module:
        return Row(points[0].out_features)

    def rate(self, parameter: str, point: ak.InjectionPoint) -> float:
        return {"slow": 1.0, "fast": 8.0, "shared.row": 0.0}[parameter]

    def observed(self, modules: Mapping[str, ak.AdapterModule], base: Any) -> None:
        for module in modules.values():
            module.seen += 100  # type: ignore[operator,assignment]

    def after_step(self, modules: Mapping[str, ak.AdapterModule], step: int, steps: int) -> None:
        assert all(p.grad is not None for module in modules.values() for p in module.parameters())
        for module in modules.values():
            module.steps.fill_(step * 1000 + steps)  # type: ignore[operator,union-attr]


@ak.hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    return [AdapterSpec("demands", f"{__name__}:Demands", kinds={"weight"}, summary="for tests")]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    ak.get_plugin_manager().register(sys.modules[__name__], name="demands")
    yield
    ak.get_plugin_manager().unregister(name="demands")


def run(folder: Path, **values: Any) -> dict[str, Tensor]:
    given = {"adapter": {"type": "demands"}, "scheduler": "constant", "learning_rate": 1e-3, **values}
    train(toy_run(folder, **given), resume=(folder / "config.yaml").exists(), silent=True)
    return load_file(folder / "adapter.safetensors")


def test_training_does_what_a_type_asks(tmp_path: Path) -> None:
    tensors = run(tmp_path / "run")
    point = "attn.q@toy.0"
    assert tensors[f"{point}/seen"] == 103
    assert tensors[f"{point}/steps"] == 8008
    assert torch.equal(tensors["shared/row"], torch.zeros_like(tensors["shared/row"]))  # a rate of 0
    slow, fast = tensors[f"{point}/slow"], tensors[f"{point}/fast"]
    assert torch.allclose(slow, torch.full_like(slow, 8e-3), rtol=0.05)  # Adam goes towards 1 at the rate of each step
    assert fast.abs().max() > 2 * slow.abs().max()


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", steps=4)
    parts = run(tmp_path / "parts", steps=8)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[key], tensor) for key, tensor in whole.items() if not key.endswith("steps"))


@pytest.mark.parametrize(("init", "micro"), [("lora_ga", 2), ("corda", 1)])
def test_lora_starts_from_the_data_of_a_run(tmp_path: Path, init: str, micro: int) -> None:
    given = {"adapter": {"type": "lora", "rank": 2, "targets": "mlp.*", "init": init}, "gradient_accumulation": micro}
    whole = run(tmp_path / "whole", steps=12, **given)
    run(tmp_path / "parts", steps=8, **given)
    parts = run(tmp_path / "parts", steps=12, **given)
    assert all(torch.equal(parts[key], tensor) for key, tensor in whole.items())
    for key, start in ((key, tensor) for key, tensor in whole.items() if key.endswith("0") and "/" in key):
        assert start.abs().max() > 0
        moved = whole[key.removesuffix("0")]
        assert not torch.equal(moved, start)
        assert torch.allclose(moved, start, atol=0.1)
