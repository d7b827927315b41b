"""The embedded sequence of the vision families: it can be changed, and made longer where the family says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit.points import InjectionPoint, Kind, TokensLayout
from tests.backends import vision_checks as checks
from tests.backends import vision_families as families

WITHOUT = ("timm swin", "timm swin v2", "timm convnext", "timm convnext v2", "timm hiera", "timm caformer", "swin")
NAMES = [name for name in families.FAMILIES if name not in WITHOUT]
EXTENDABLE = ["timm eva", "timm eva packed", "timm eva post-norm"]
EXTENDABLE += ["dinov2", "dinov2 gated", "dinov2 registers", "clip", "siglip"]


@dataclass(frozen=True)
class Register(ak.AdapterConfig):
    """Adds a learnt row to every token, and learnt tokens behind them."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"tokens"})
    targets: str = "tokens"
    count: int = 0

    def build(self, point: InjectionPoint) -> RegisterModule:
        return RegisterModule(self.count, point.out_features)


class RegisterModule(ak.AdapterModule):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.shift, self.rows = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.randn(count or 1, width))
        self.count = count

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x) + self.shift + 0 * self.rows.sum()
        return torch.cat([y, self.rows.expand(y.shape[0], -1, -1)], dim=1) if self.count else y


def first_block(model: nn.Module) -> nn.Module:
    """The block that holds the first attention."""
    names = ak.points(model, "attn.q")[0].path.split(".")
    number = next(i for i, name in enumerate(names) if name.isdigit())
    return model.get_submodule(".".join(names[: number + 1]))


def first_token(output: Tensor) -> Tensor:
    return output[:, 0] if output.dim() == 3 else output


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_what_the_first_block_sees(name: str) -> None:
    model = families.build(name)
    adapters = ak.Adapters(model)
    adapters.add("a", Register())
    checks.randomise(adapters)
    module: Any = next(iter(adapters.modules("a").values()))
    seen: list[Tensor] = []
    first_block(model).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    with torch.no_grad():
        families.see(model)
        with adapters.disabled():
            families.see(model)
    difference = seen[0] - seen[1]
    torch.testing.assert_close(difference, module.shift.expand_as(difference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_families_that_take_more_tokens_say_so(name: str) -> None:
    model = families.build(name)
    [point] = ak.points(model, "tokens")
    assert isinstance(point.layout, TokensLayout)
    assert point.layout.extendable == (name in EXTENDABLE)
    if not point.layout.extendable:
        return
    adapters = ak.Adapters(model)
    adapters.add("a", Register(count=2))
    seen: list[int] = []
    first_block(model).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        longer = first_token(families.see(model))
        with adapters.disabled():
            assert not torch.allclose(longer, first_token(families.see(model)), atol=1e-4)
    assert seen[0] == seen[1] + 2
