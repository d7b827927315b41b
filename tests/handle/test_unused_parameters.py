"""Experts that no token reaches and adapters that routes leave out: gradients of zero, for whoever waits for them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import adapterkit as ak
from adapterkit.testing import toys
from adapterkit.torchvision_ops import ensure_torchvision_ops
from tests.values import randomize

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
X = torch.tensor([[3, 1, 4]])


def mixtral() -> Any:
    return mixture("Mixtral", num_key_value_heads=1, num_local_experts=8, num_experts_per_tok=1)


def deepseek() -> Any:
    """The first layer is dense; there is an expert that all tokens share."""
    ranks = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    layers = {"first_k_dense_replace": 1, "moe_intermediate_size": 8}
    return mixture("DeepseekV3", num_key_value_heads=2, **ranks, **experts, **layers)


def mixture(name: str, **options: Any) -> Any:
    ensure_torchvision_ops()  # a process that is spawned imports no conftest
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **options))


def adapted(model: nn.Module) -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="moe.{gate,up,down} attn.o"))
    randomize(adapters, "a")
    return adapters


def test_experts_without_a_token_have_a_gradient_of_zero() -> None:
    for model in (mixtral(), deepseek()):
        adapters = adapted(model)
        loss = model(X, labels=X).loss
        loss.backward()
        found = [parameter.grad for parameter in adapters.parameters()]
        assert all(grad is not None for grad in found)
        zeros = [not grad.any() for grad in found if grad is not None]
        assert 0 < sum(zeros) < len(zeros)
        reached = torch.autograd.grad(model(X, labels=X).loss, [*adapters.parameters()], allow_unused=True)
        for grad, again in zip(found, reached, strict=True):
            assert grad is not None
            assert torch.equal(grad, torch.zeros_like(grad) if again is None else again)


def test_what_a_model_returns_is_what_it_was() -> None:
    model = mixtral()
    adapters = adapted(model)
    with torch.no_grad():
        plain = model(X, labels=X)
    outputs = model(X, labels=X)
    assert type(outputs) is type(plain)
    assert outputs.keys() == plain.keys()
    assert torch.equal(outputs.logits, plain.logits)
    assert torch.equal(outputs.loss, plain.loss)
    assert outputs.logits.grad_fn.name().startswith("_Reaching")
    adapters.freeze()
    assert not model(X).logits.requires_grad
    adapters.train("a")
    with adapters.disabled():
        assert not model(X).logits.requires_grad
    adapters.detach()
    assert not model._forward_hooks


def test_a_second_backward_adds_up_and_a_part_of_the_graph_does_too() -> None:
    model = mixtral()
    adapters = adapted(model)
    outputs = model(X, labels=X)
    (outputs.loss + outputs.logits.sum()).backward()
    once = [parameter.grad.clone() for parameter in adapters.parameters() if parameter.grad is not None]
    outputs = model(X, labels=X)
    (outputs.loss + outputs.logits.sum()).backward()
    for parameter, grad in zip(adapters.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)


def test_without_other_processes_an_adapter_that_is_routed_to_no_row_has_no_gradient() -> None:
    """An optimizer then leaves it alone."""
    toys.register()
    model = toys.ToyModel()
    adapters = ak.Adapters(model)
    for name in "ab":
        adapters.add(name, ak.LoRA(rank=2, targets="attn.o"))
    adapters.train("a", "b")
    with adapters.routed(["a", "a", None]):
        model(toys.ids()).sum().backward()
    assert all(parameter.grad is None for parameter in adapters.parameters("b"))


STEPS = {0: [["a", "a"], [None, None], ["a", None]], 1: [["a", "b"], ["b", None], [None, "a"]]}


def routed(rank: int, model: nn.Module, adapters: ak.Adapters, step: int) -> None:
    x = toys.ids(batch=4)[2 * rank : 2 * rank + 2]
    with adapters.routed(STEPS[rank][step]):
        loss = model(x).square().mean()
    if loss.requires_grad or distributed.is_initialized():
        loss.backward()


def two(model: nn.Module) -> ak.Adapters:
    adapters = ak.Adapters(model)
    for name in "ab":
        adapters.add(name, ak.LoRA(rank=2, targets="attn.o mlp.up"))
        randomize(adapters, name)
    adapters.train("a", "b")
    return adapters


def work(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        toys.register()
        adapters = two(model := toys.ToyModel().double())
        wrapped = DistributedDataParallel(model)
        found: list[list[Tensor | None]] = []
        for step in range(3):
            routed(rank, wrapped, adapters, step)
            found.append([p.grad for p in adapters.parameters()])
            for parameter in adapters.parameters():
                parameter.grad = None
        experts = adapted(mixture := mixtral().double())
        wrapped = DistributedDataParallel(mixture, gradient_as_bucket_view=True)
        for step in range(3):
            x = X + step + 3 * rank
            wrapped(x, labels=x).loss.backward()
        found.append([p.grad for p in experts.parameters()])
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_wait_for_nothing_and_have_the_gradients_of_one(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    toys.register()
    adapters = two(model := toys.ToyModel().double())
    experts = adapted(mixture := mixtral().double())
    expected = []
    for step in range(3):
        for rank in (0, 1):
            routed(rank, model, adapters, step)
            x = X + step + 3 * rank
            mixture(x, labels=x).loss.backward()
        expected.append([p.grad for p in adapters.parameters()])
        for parameter in adapters.parameters():
            parameter.grad = None
    expected.append([p.grad for p in experts.parameters()])
    for rank in (0, 1):
        for mine, theirs in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            for grad, summed in zip(mine, theirs, strict=True):
                if summed is None:
                    assert grad is None or not grad.any()
                else:
                    torch.testing.assert_close(2 * grad, summed)
