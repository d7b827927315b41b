"""What a type of adapter can do is told by what it defines, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.adapters.dora import DoRAModule
from adapterkit.adapters.fuse import FuseModule
from adapterkit.adapters.lora import LoRAModule
from adapterkit.adapters.prefix import DirectPrefix
from adapterkit.adapters.prompt import PromptModule
from adapterkit.contract.abilities import Abilities
from adapterkit.kernels.sums import combine, effect


class Nothing(ak.AdapterModule):
    pass


class Delta(ak.AdditiveModule):
    def delta(self, x: Tensor) -> Tensor:
        return x


class Around(Delta):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        return super().forward(x, base) * 2


class Weight(ak.AdditiveModule):
    def delta_weight(self) -> Tensor:
        return torch.zeros(())


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (ak.AdapterModule, set()),
        (ak.AdditiveModule, set()),
        (Nothing, set()),
        (Delta, {"delta", "adds"}),
        (Around, {"delta", "forward"}),
        (Weight, {"merge"}),
        (LoRAModule, {"delta", "adds", "low_rank", "merge", "initialise"}),
        (DoRAModule, {"forward", "merge", "initialise"}),
        (DirectPrefix, {"extend"}),
        (PromptModule, {"lengthen", "initialise"}),
        (FuseModule, {"combine"}),
    ],
)
def test_what_a_type_can_do(kind: type[ak.AdapterModule], told: set[str]) -> None:
    found = kind.abilities
    assert {name for name in Abilities.__dataclass_fields__ if getattr(found, name)} == told


def test_a_forward_around_a_delta_is_called() -> None:
    """A type may write both: then its effect is not its delta alone, in a sum neither."""
    x, base = torch.ones(2, 3), lambda x: x * 10
    module = Around()
    assert torch.equal(combine(x, base, [(module, 1.0)]), torch.full((2, 3), 22.0))
    assert torch.equal(effect(module, x, base(x), base), torch.full((2, 3), 12.0))
    assert torch.equal(combine(x, base, [(module, 0.5), (Delta(), 2.0)]), torch.full((2, 3), 18.0))


def test_hooks_of_an_adapter_run() -> None:
    """Those of torch, and what an offload hook puts in the place of its forward."""
    x, base = torch.ones(2, 3, requires_grad=True), lambda x: x * 10
    seen: list[str] = []
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        module = Delta()
        hook = getattr(module, f"register_{register}")(lambda *_, name=register: seen.append(name))
        for active in ([(module, 1.0)], [(module, 0.5)]):
            combine(x, base, active).sum().backward()
        assert seen == [register, register]
        hook.remove()
        combine(x, base, [(module, 1.0)])
        assert seen == [register, register]
        seen.clear()
    module = Delta()
    module.forward = lambda x, base: base(x) + 5  # type: ignore[method-assign]
    assert torch.equal(combine(x, base, [(module, 1.0)]), torch.full((2, 3), 15.0))
    assert torch.equal(combine(x, base, [(module, 2.0)]), torch.full((2, 3), 20.0))


def test_a_type_that_writes_neither_says_so() -> None:
    class Empty(ak.AdditiveModule):
        pass

    with pytest.raises(NotImplementedError, match="Empty defines neither delta nor delta_weight"):
        Empty()(torch.ones(1), lambda x: x)
