"""Blocks that are not run, and adapters that are left out of the first layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.adapter import Base
from adapterkit.engine.blocks import BlockBase
from tests.values import randomize

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


class SkipModule(ak.AdapterModule):
    """`y = x`: the block around does not run; in training at a chance (LayerDrop, Fan et al. 2019)."""

    scalable = False

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, x: Tensor, base: Base) -> Tensor:
        skips = bool(torch.rand(()) < self.chance) if self.training else True
        return x if skips else base(x)


@dataclass(frozen=True)
class Skip(ak.AdapterConfig):
    """Some blocks are left out: early exit, as LayerSkip trains for it (Elhoushi et al. 2024, arXiv:2404.16710)."""

    kinds = frozenset({"output"})
    neutral = False
    targets: str = "hidden@layer>=2"
    chance: float = 0.5

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        return super().accepts(point) if point.is_block else "only whole blocks can be left out"

    def build(self, point: ak.InjectionPoint) -> SkipModule:
        return SkipModule(self.chance)


SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4, "vocab_size": 11,
}  # fmt: skip
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "Llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=2)), "model.layers"),
    "GPT2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=11)), "transformer.h"),
    "Bert": (lambda: t.BertModel(t.BertConfig(**SIZES), add_pooling_layer=False), "encoder.layer"),
}


def made(name: str) -> tuple[Any, nn.ModuleList]:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    return model, model.get_submodule(MODELS[name][1])


def counted(blocks: nn.ModuleList) -> list[int]:
    """How often each block's own parts ran: a list that goes on counting."""
    counts = [0] * len(blocks)

    def count(i: int) -> Callable[..., None]:
        def add(*_: Any) -> None:
            counts[i] += 1

        return add

    for i, block in enumerate(blocks):
        norms = (one for one in block.modules() if isinstance(one, nn.LayerNorm) or "RMSNorm" in type(one).__name__)
        next(norms).register_forward_pre_hook(count(i))
    return counts


@pytest.mark.parametrize("name", list(MODELS))
def test_a_block_that_is_left_out_does_not_run(name: str) -> None:
    model, blocks = made(name)
    adapters = ak.Adapters(model)
    base = model(IDS)[0]
    adapters.add("skip", Skip())
    model(IDS)  # a block is run once, to see what it returns
    counts = counted(blocks)
    found = model(IDS)[0]
    assert counts == [1, 1, 0, 0]
    with adapters.disabled():
        assert torch.equal(model(IDS)[0], base)
    assert counts == [2, 2, 1, 1]
    adapters.detach()
    shorter, layers = made(name)
    del layers[2:]
    assert torch.equal(found, shorter(IDS)[0])


def test_in_training_blocks_are_left_out_at_random() -> None:
    model, blocks = made("Llama")
    adapters = ak.Adapters(model)
    adapters.add("skip", Skip(targets="hidden", chance=0.5))
    adapters.add("lora", ak.LoRA(rank=2, targets="attn.q"))
    randomize(adapters, "lora")
    adapters.activate(["skip", "lora"])
    model(IDS)
    model.train()
    counts = counted(blocks)
    torch.manual_seed(1)
    for _ in range(10):
        model(IDS)
    assert all(0 < count < 10 for count in counts)
    adapters.detach()


class Pair(nn.Module):
    """A block that gives two things."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.layer, self.alone = nn.Linear(8, 8), alone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x + self.layer(x)
        return (y,) if self.alone else (y, x.sum())


def test_what_else_a_block_returns_is_kept_or_told() -> None:
    x = torch.randn(2, 3, 8)
    entries: dict[str, int] = {}
    for alone in (True, False):
        block = Pair(alone)
        base = BlockBase(x, lambda block=block: block(x), None, None)
        y = base(x)
        assert base(x) is y
        assert torch.equal(base.returned(2 * y, {}, "p")[0], 2 * y)
        assert len(base.returned(y, {}, "p")) == (1 if alone else 2)
        with pytest.raises(ValueError, match="only be asked for the x"):
            base(x + 1)
        skipped = BlockBase(x, lambda block=block: block(x), None, None)
        if alone:
            assert torch.equal(skipped.returned(x, entries, "alone")[0], x)
        else:
            with pytest.raises(errors.AttachError, match="returns 2 values, so it cannot be left out"):
                skipped.returned(x, entries, "pair")
    assert entries == {"alone": 1, "pair": 2}


# -- AdapterDrop ----------------------------------------------------------------------------------------------------


def dropping(adapters: ak.Adapters, name: str, first: Callable[[int], int]) -> None:
    """AdapterDrop (Rücklé et al. 2021, arXiv:2010.11918): no adapter in the first layers, as many as a step says."""
    adapters.activate({name: lambda point, step: float(int(point.tags["layer"]) >= first(step))})


def test_adapters_are_dropped_from_the_first_layers() -> None:
    model, _ = made("Llama")
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck())
    randomize(adapters, "a")
    ran: list[int] = []
    for key, module in adapters.modules("a").items():
        module.register_forward_pre_hook(lambda *_, key=key: ran.append(int(key.rpartition(".")[2])))
    dropping(adapters, "a", lambda step: step)
    for step in range(5):
        adapters.at_step(step)
        ran.clear()
        for parameter in adapters.parameters("a"):
            parameter.grad = None
        y = model(IDS).logits
        assert ran == list(range(step, 4))
        if step < 4:
            y.square().sum().backward()
        modules = adapters.modules("a").items()
        reached = [key for key, one in modules if any(p.grad is not None for p in one.parameters())]
        trained = {int(key.rpartition(".")[2]) for key in reached}
        assert trained == set(range(step, 4))
        with adapters.activated({"a": {f"*@layer>={step}": 1.0}} if step < 4 else None):  # fixed, as for inference
            assert torch.equal(model(IDS).logits, y)


def test_dropped_at_random_in_training() -> None:
    model, _ = made("Llama")
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2))
    draws = [3, 0, 2, 1]
    dropping(adapters, "a", lambda step: draws[step % 4])
    optimizer = torch.optim.AdamW(adapters.parameter_groups("a", lr=1e-2))
    before = {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}
    adapters.at_step(0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {key for key, tensor in adapters.state_dict("a").items() if not torch.equal(tensor, before[key])}
    assert moved
    assert all(key.partition("/")[0].endswith(".3") for key in moved)
