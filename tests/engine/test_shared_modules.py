"""Modules that a model uses more than once: shared under two names, and called several times in one forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak


class Shared(nn.Module):
    """One layer under two names, and one that is called three times (ALBERT's way of being deep)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.again = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)))
        for _ in range(3):
            x = torch.tanh(self.again(x))
        return x


def test_every_use_sees_the_adapter_and_a_shared_module_is_one_point() -> None:
    model = Shared().double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    base = model(x)
    assert [point.path for point in ak.points(model)] == ["first", "again"]
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(0, 0.5)
    updates = {p.path: m.B @ m.A for p, m in zip(adapters.points(), adapters.modules("a").values(), strict=True)}  # type: ignore[operator]
    weight = model.first.weight + updates["first"]
    expected = F.linear(torch.tanh(F.linear(x, weight, model.first.bias)), weight, model.first.bias)
    for _ in range(3):
        expected = torch.tanh(F.linear(expected, model.again.weight + updates["again"]))
    assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-10)
    with adapters.merged():
        assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-10)
        assert model.first is model.second
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters())
    adapters.detach()
    assert torch.equal(model(x), base)
