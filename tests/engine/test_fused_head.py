"""Losses that are fused with the head read its weight: it has the adapters in it, and gradients reach them."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from tests.values import randomize

IDS = torch.arange(12).view(2, 6)
SIZES: Any = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}


class Fused(torch.autograd.Function):
    """A product that torch shows to nobody, as a kernel's."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).t() @ hidden.flatten(0, -2)


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "called": lambda head, hidden: head(hidden),
    "read": lambda head, hidden: F.linear(hidden, head.weight),  # type: ignore[arg-type]
    "kernel": lambda head, hidden: Fused.apply(hidden, head.weight),  # type: ignore[return-value]
}


class Plain(nn.Module):
    """Of no family."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)

    def model(self, ids: Tensor) -> tuple[Tensor]:
        return (self.body(self.embed(ids)),)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **SIZES))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    )
    model.__dict__["model"] = model.transformer
    return model


def adapted(make: Callable[[], Any], way: str, config: ak.AdapterConfig) -> tuple[Any, ak.Adapters]:
    """A model whose forward is another library's."""
    torch.manual_seed(0)
    model = make().eval()
    adapters = ak.Adapters(model)
    adapters.add("x", config)
    randomize(adapters, "x")
    use = WAYS[way]

    def forward(self: Any, ids: Tensor) -> Tensor:
        return use(self.lm_head if "lm_head" in self._modules else self.head, self.model(ids)[0])

    model.forward = types.MethodType(forward, model)
    return model, adapters


@pytest.mark.parametrize("make", [llama, gpt2, Plain])
@pytest.mark.parametrize("config", [ak.LoRA(rank=2, targets="head *@layer=0"), ak.Trainable("head")])
def test_a_weight_that_is_read_has_the_adapters_in_it(make: Callable[[], Any], config: ak.AdapterConfig) -> None:
    if make is Plain and config.targets != "head":
        config = ak.LoRA(rank=2, targets="head linear")
    found = {}
    for way in WAYS:
        model, adapters = adapted(make, way, config)
        y = model(IDS)
        y.square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(model(IDS), y)
        with adapters.disabled():
            base = model(IDS)
        assert not torch.allclose(base, y)
        found[way] = (y, [parameter.grad for parameter in adapters.parameters()])
    for way in ("read", "kernel"):
        torch.testing.assert_close(found[way], found["called"], rtol=1e-4, atol=1e-5)


def test_a_bias_that_nobody_would_read_is_refused() -> None:
    config = ak.Trainable("head", outputs=3)
    assert adapted(llama, "called", config)[0](IDS).shape == (2, 6, 3)
    for way in ("read", "kernel"):
        with pytest.raises(errors.IncompatibleTargetError, match="adds a bias"):
            adapted(llama, way, config)[0](IDS)


def trained(outside: bool, config: ak.AdapterConfig, steps: int = 6) -> list[str]:
    """What a loop is told whose loss reads the head's weight outside of the model's forward, or calls the head."""
    torch.manual_seed(0)
    model = llama()
    adapters = ak.Adapters(model)
    adapters.add("x", config)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            logits = F.linear(model.model(IDS)[0], model.lm_head.weight) if outside else model(IDS).logits
            F.cross_entropy(logits.flatten(0, 1), IDS.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(one.message) for one in caught]


def test_a_loss_outside_of_the_forward_is_told_once() -> None:
    for steps in (1, 6):
        [told] = trained(True, ak.LoRA(rank=2, targets="attn.q head"), steps)
        assert "no gradient reaches the adapter at head@language" in told
    assert not trained(False, ak.LoRA(rank=2, targets="attn.q head"))
    assert not trained(True, ak.LoRA(rank=2, targets="attn.q"))
