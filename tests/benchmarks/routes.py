"""A batch whose rows have adapters of their own, against the base and PEFT's `adapter_names`.

The limit: a row's own update costs 2 r (i + o) multiplications and additions a token beside the base's 2 i o, so at
hidden size 512 and rank 16 about a fifteenth of it; what is above that is the starting of operations and the copies.
How many adapters are attached is no part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import adapterkit as ak
from tests.benchmarks import rivals
from tests.benchmarks.measure import Side, Timing, measure


def _timed(count: int, length: int, rounds: int) -> Mapping[str, Timing]:
    """A batch of `count` rows of `length` tokens, each with its own adapter, rank 16 on 56 layers (hidden 512)."""
    names = [f"a{number}" for number in range(count)]
    both, ids = rivals.pair(rivals.llama(hidden=512, layers=8), names), rivals.tokens(count, length)
    both.adapters.freeze()
    both.theirs.requires_grad_(requires_grad=False)
    _require_parity(both, names, ids)

    @torch.no_grad()
    def ours(_: object) -> None:
        with both.adapters.routed(names):
            both.ours(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def theirs(_: object) -> None:
        both.theirs(input_ids=ids, use_cache=False, adapter_names=names)

    @torch.no_grad()
    def base(_: object) -> None:
        with both.adapters.disabled():
            both.ours(input_ids=ids, use_cache=False)

    return measure({"floor": Side(base), "adapterkit": Side(ours), "peft": Side(theirs)}, rounds)


@torch.no_grad()
def _require_parity(both: rivals.Pair, names: list[str], ids: Tensor) -> None:
    """Both route alike, and every row as with its adapter alone.

    Raises:
        AssertionError: They do not, and no timing means anything.
    """
    with both.adapters.routed(names):
        ours = both.ours(input_ids=ids).logits
    theirs = both.theirs(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for row, name in enumerate(names[:3]):
        with both.adapters.activated(name):
            alone = both.ours(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(ours[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def eight(rounds: int) -> Mapping[str, Timing]:
    """8 rows of 16 tokens, 8 adapters."""
    return _timed(8, 16, rounds)


def thirty_two(rounds: int) -> Mapping[str, Timing]:
    """32 rows of 64 tokens, 32 adapters."""
    return _timed(32, 64, max(5, rounds // 3))


def pools(rounds: int) -> Mapping[str, Timing]:
    """8 rows of 16 tokens over 8 adapters, of 10 that are attached and of 1,000 (2 layers, rank 4 on q and v)."""
    ids, sides = rivals.tokens(8, 16), dict[str, Side]()
    found = dict[int, Tensor]()
    for attached in (10, 1000):
        model = rivals.llama(hidden=512, layers=2).requires_grad_(requires_grad=False)
        adapters = ak.Adapters(model)
        config = ak.LoRA(rank=4, targets="attn.{q,v}")
        for number in range(attached):
            adapters.add(f"a{number}", config, seed=number)
        adapters.freeze()
        names = [f"a{number}" for number in range(8)]
        _randomize(adapters, names)
        sides[f"adapterkit, {attached} attached"] = Side(_routing(model, adapters, names, ids))
        with torch.no_grad(), adapters.routed(names):
            found[attached] = model(input_ids=ids).logits
    torch.testing.assert_close(found[10], found[1000], rtol=0, atol=0)
    return measure(sides, rounds)


@torch.no_grad()
def _randomize(adapters: ak.Adapters, names: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in names:
        for parameter in adapters.parameters(name):
            parameter.normal_(std=0.05, generator=generator)


def _routing(model: nn.Module, adapters: ak.Adapters, names: list[str], ids: Tensor) -> Callable[[object], None]:
    @torch.no_grad()
    def run(_: object) -> None:
        with adapters.routed(names):
            model(input_ids=ids, use_cache=False)

    return run
