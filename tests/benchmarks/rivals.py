"""The same Llama with adapterkit's LoRA and with PEFT's, in two copies with the same weights; and parity of the two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkit as ak

RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = ak.LoRA(rank=RANK, targets="linear")


def peft_config() -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS)


def llama(hidden: int, layers: int, vocabulary: int = 512) -> LlamaForCausalLM:
    """A random Llama with half as many heads for keys and values, seven projections a layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def tokens(batch: int, length: int, vocabulary: int = 512) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


@dataclass
class Pair:
    """Two copies of a base: `ours` under a handle, `theirs` inside a PeftModel."""

    ours: nn.Module
    adapters: ak.Adapters
    theirs: Any

    @property
    def models(self) -> tuple[nn.Module, nn.Module]:
        return self.ours, self.theirs


def sharing(base: nn.Module) -> Any:
    """A copy with the very weights: where a copy of those lies in memory can matter more than what is measured."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def pair(base: nn.Module, names: list[str], copied: Callable[[nn.Module], Any] = copy.deepcopy) -> Pair:
    """Both with the same adapters: the factors are random, and equal on both sides."""
    ours = copied(base)
    adapters = ak.Adapters(ours)
    theirs: Any = None
    for number, name in enumerate(names):
        adapters.add(name, CONFIG, seed=number)
        if theirs is None:
            theirs = peft.get_peft_model(copied(base), peft_config(), adapter_name=name)
        else:
            theirs.add_adapter(name, peft_config())
        _equate(adapters, theirs, name, number)
    adapters.activate(names[0])
    adapters.train(names[0])
    theirs.set_adapter(names[0])
    return Pair(ours, adapters, theirs.eval())


@torch.no_grad()
def _equate(adapters: ak.Adapters, theirs: Any, name: str, seed: int) -> None:
    """Random second factors, so that gradients and outputs tell something, and the same factors for PEFT."""
    generator = torch.Generator().manual_seed(seed)
    paths = {point.id: point.path for point in adapters.points("linear")}
    for key, module in adapters.modules(name).items():
        module.B.normal_(std=0.05, generator=generator)
        layer = theirs.base_model.model.get_submodule(paths[key])
        layer.lora_A[name].weight.copy_(module.A)
        layer.lora_B[name].weight.copy_(module.B)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward."""
    loss(model, ids).backward()


def clear(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


def require_parity(both: Pair, name: str, ids: Tensor) -> None:
    """Outputs and gradients of both sides agree, and the adapters do something.

    Raises:
        AssertionError: They do not, and no timing means anything.
    """
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in both.models)
        with both.adapters.disabled():
            base = both.ours(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 1e-2, "the adapters do nothing"
    for model in both.models:
        clear(model)
        step(model, ids)
    paths = {point.id: point.path for point in both.adapters.points("linear")}
    for key, module in both.adapters.modules(name).items():
        layer = both.theirs.base_model.model.get_submodule(paths[key])
        for mine, yours in ((module.A, layer.lora_A[name].weight), (module.B, layer.lora_B[name].weight)):
            assert mine.grad is not None, f"no gradient at {key}"
            assert mine.grad.abs().max() > 0, f"a gradient of zero at {key}"
            torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-3, atol=1e-5)
    for model in both.models:
        clear(model)
