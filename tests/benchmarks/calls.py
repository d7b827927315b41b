"""What a call and a switch cost beside the arithmetic: one token through adapted layers, idle layers, many points."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import adapterkit as ak
from tests.benchmarks import rivals
from tests.benchmarks.measure import Side, Timing, measure

_CALLS = 1000


def decoding(rounds: int) -> Mapping[str, Timing]:
    """One token, batch of 1, in evaluation: rank 16 on the 28 linear layers of a Llama (hidden 512, 4 layers).

    All sides compute with the same weights.
    """
    base = rivals.llama(hidden=512, layers=4)
    both, ids = rivals.pair(base, ["a"], rivals.sharing), rivals.tokens(1, 1)
    rivals.require_parity(both, "a", rivals.tokens(2, 8))

    def side(model: nn.Module) -> Side:
        return Side(lambda _: _forwards(model, ids))

    return measure({"floor": side(base), "adapterkit": side(both.ours), "peft": side(both.theirs)}, rounds)


@torch.no_grad()
def _forwards(model: nn.Module, ids: Tensor) -> None:
    for _ in range(10):
        model(input_ids=ids, use_cache=False)


def idling(rounds: int) -> Mapping[str, Timing]:
    """1,000 calls of a linear layer (16 to 16), so that a millisecond is a microsecond a call. The bar is 1 ms more."""
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    bare, x = copy.deepcopy(layers[0]), torch.randn(1, 1, 16)
    adapters = ak.Adapters(layers)
    for name, targets in (("here", "path:0"), ("there", "path:1")):
        adapters.add(name, ak.LoRA(rank=4, targets=targets))
    for choice in (None, "there"):
        with adapters.activated(choice), torch.no_grad():
            assert torch.equal(layers[0](x), bare(x))

    @torch.no_grad()
    def calls(layer: nn.Module) -> None:
        for _ in range(_CALLS):
            layer(x)

    def side(layer: nn.Module, choice: str | None) -> Side:
        return Side(lambda _: calls(layer), prepare=lambda: adapters.activate(choice))

    sides = {
        "floor": side(bare, None),
        "nothing acts": side(layers[0], None),
        "something acts elsewhere": side(layers[0], "there"),
    }
    return measure(sides, rounds)


def switching_points(rounds: int) -> Mapping[str, Timing]:
    """1,000 switches between two adapters (a millisecond is a microsecond a switch), at 56 points and at 10,000."""
    few, many = _switch(56), _switch(10_000)
    return measure({"56 points": Side(lambda _: few()), "10,000 points": Side(lambda _: many())}, rounds, warmup=1)


def _switch(points: int) -> Callable[[], None]:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(points))).eval()
    adapters, x = ak.Adapters(model), torch.ones(1, 2)
    with torch.no_grad():
        expected = []
        for number, name in enumerate("ab"):
            adapters.add(name, ak.LoRA(rank=1, targets="*"), seed=number)
            for module in adapters.modules(name).values():
                module.B.fill_(0.1 * (number + 1))  # type: ignore[operator]
            expected.append(model(x))
        for name, y in zip("ab", expected, strict=True):
            adapters.activate(name)
            assert torch.equal(model(x), y)
    assert not torch.equal(*expected)

    def switches() -> None:
        for _ in range(_CALLS // 2):
            adapters.activate("a")
            adapters.activate("b")

    return switches
