"""X-LoRA-like gates: against an explicit loop, with gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as t
from adapterkit_gating.gate import Gate, gated
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 8, 2]])


def llama() -> t.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = t.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=11, attn_implementation="eager")
    return t.LlamaForCausalLM(config).double().eval()


def experts(model: nn.Module) -> ak.Adapters:
    adapters = ak.Adapters(model)
    for name, targets in (("a", "attn.{q,v} mlp.down"), ("b", "attn.{q,o}"), ("c", "mlp.*@layer=1")):
        adapters.add(name, ak.LoRA(rank=2, targets=targets))
        for parameter in adapters.parameters(name):
            nn.init.normal_(parameter, std=0.3)
    adapters.freeze()
    return adapters


def loop(model: nn.Module, adapters: ak.Adapters, gate: Gate, weights: Tensor) -> Tensor:
    """The same by hand: every layer's output, and for each expert its weight times `x (s B A)^T`."""
    other: Any = copy.deepcopy(model)
    ak.Adapters(other).detach()
    paths = {point.id: (point.path, int(point.tags["layer"])) for point in adapters.points() if "layer" in point.tags}
    for i, name in enumerate(gate.experts):
        for key, module in adapters.modules(name).items():
            path, layer = paths[key]
            scales = weights[:, :, gate.layers.index(layer), i, None]
            delta = module.delta_weight().detach()  # type: ignore[operator]
            other.get_submodule(path).register_forward_hook(
                lambda layer, args, y, scales=scales, delta=delta: y + scales * (args[0] @ delta.mT)
            )
    return other(IDS).logits


def hidden(model: Any) -> Tensor:
    return model(IDS, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("width", [None, 8])
def test_it_is_an_explicit_loop(width: int | None) -> None:
    model = llama()
    adapters = experts(model)
    with adapters.disabled():
        expected_hidden = hidden(model)
    gate = Gate.between(adapters, ["a", "b", "c"], 16, width=width, temperature=0.5).double()
    assert gate.layers == [0, 1]
    with gated(adapters, gate, lambda: hidden(model)) as weights:
        y = model(IDS).logits
        value = y.square().sum()
        value.backward()
    assert torch.equal(weights, gate(expected_hidden))
    assert torch.allclose(weights.sum(-1), torch.ones(3, 4, 2, dtype=torch.float64))
    found = [p.grad.clone() for p in gate.parameters()]  # type: ignore[union-attr]
    gate.zero_grad()
    by_hand = loop(model, adapters, gate, gate(expected_hidden))
    by_hand.square().sum().backward()
    assert torch.allclose(y, by_hand, rtol=1e-10, atol=1e-10)
    for one, p in zip(found, gate.parameters(), strict=True):
        assert p.grad is not None
        assert p.grad.abs().max() > 0
        assert torch.allclose(one, p.grad, rtol=1e-8, atol=1e-10)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointed_blocks_give_the_gate_its_gradients() -> None:
    model = llama()
    adapters = experts(model)
    gate = Gate.between(adapters, ["a", "b", "c"], 16).double()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            options = {"use_reentrant": False, "context_fn": adapters.recompute_context}
            model.gradient_checkpointing_enable(options)
            model.train()
        gate.zero_grad()
        with gated(adapters, gate, lambda: hidden(model)):
            value = model(IDS).logits.square().sum()
        value.backward()
        grads.append([p.grad.clone() for p in gate.parameters()])  # type: ignore[union-attr]
    assert all(torch.allclose(one, other, rtol=1e-10) for one, other in zip(*grads, strict=True))


def test_it_learns_which_expert_is_right() -> None:
    model = llama()
    adapters = experts(model)
    with adapters.activated("b"):
        wanted = model(IDS).logits.detach()
    gate = Gate.between(adapters, ["a", "b", "c"], 16).double()
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    losses = []
    for _ in range(80):
        with gated(adapters, gate, lambda: hidden(model)) as weights:
            loss = (model(IDS).logits - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    assert weights[..., 1].mean() > 0.8


def test_what_has_no_layer_is_refused() -> None:
    model = llama()
    adapters = experts(model)
    adapters.add("head", ak.LoRA(rank=2, targets="head"))
    with pytest.raises(errors.ConfigError, match="lies in no numbered layer"):
        Gate.between(adapters, ["a", "head"], 16)
    with pytest.raises(errors.UnknownNameError):
        Gate.between(adapters, ["nobody"], 16)
