"""LLaMA-Adapter: conformance, its equation, and PEFT's numbers from the same weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import adapterkit_conditioning
import pytest
import torch
from adapterkit_conditioning.llama_adapter import LlamaAdapter
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """The package's types have names, installed or not."""
    manager = ak.get_plugin_manager()
    if manager.spec_of(LlamaAdapter) is not None:
        yield
        return
    manager.register(adapterkit_conditioning, name="conditioning_tests")
    yield
    manager.unregister(name="conditioning_tests")


class TestLlamaAdapter(AdapterConformance):
    config = LlamaAdapter(length=3)


@pytest.mark.slow
class TestOneGate(AdapterConformance):
    config = LlamaAdapter(length=2, gate="layer")


def llama(attention: str = "sdpa", kv_heads: int = 2, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=50, num_key_value_heads=kv_heads, attn_implementation=attention, **size, **options
    )
    return transformers.LlamaForCausalLM(config).eval()


def moved(model: nn.Module, config: LlamaAdapter) -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    for module in adapters.modules("a").values():
        nn.init.uniform_(module.gate, 0.2, 0.8)  # type: ignore[arg-type]
    return adapters


def ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("kv_heads", "gate"), [(2, "heads"), (4, "heads"), (2, "layer")])
@pytest.mark.filterwarnings("ignore")
def test_it_is_that_of_peft(kv_heads: int, gate: str) -> None:
    """At start both are the base; then PEFT's one gate for all heads is that of a layer, or `tanh(g)` of every head."""
    peft = pytest.importorskip("peft")
    base = llama(kv_heads=kv_heads)
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    adapters = ak.Adapters(base)
    expected = base(ids()).logits
    adapters.add("a", LlamaAdapter(length=4, gate=gate, targets="attn.kv@layer>=1"))
    assert torch.equal(base(ids()).logits, expected)
    assert torch.equal(theirs(ids()).logits, expected)
    for module, layer in zip(adapters.modules("a").values(), (1, 2), strict=True):
        other = theirs.base_model.model.model.layers[layer].self_attn
        nn.init.constant_(other.adaption_gate, (1.3 if gate == "layer" else 0.3) * layer)
        module.prompt.data.copy_(other.adaption_prompt[0])  # type: ignore[union-attr,operator]
        theirs_gate = other.adaption_gate.detach()
        module.gate.data.fill_((theirs_gate if gate == "layer" else torch.atanh(theirs_gate)).item())  # type: ignore[union-attr,operator]
    found, expected, before = base(ids()).logits, theirs(ids()).logits, expected
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - before).abs().max() > 1e-3


def test_the_equation() -> None:
    """Eq. 9: `[softmax(S_K) tanh(g); softmax(S_T)]` over `[V_K; V_T]`, without rotary for the prompt."""
    base = llama("eager")
    adapters = moved(base, LlamaAdapter(length=4, targets="attn.kv@layer=1"))
    (module,) = adapters.modules("a").values()
    attention, seen = base.model.layers[1].self_attn, {}
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    attention.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs, args=args), with_kwargs=True)
    base(ids())
    found, x = seen["mixed"], seen["hidden_states"]
    cos, sin = (part[:, None] for part in seen["position_embeddings"])

    def heads(layer: nn.Linear, source: Tensor) -> Tensor:
        return layer(source).unflatten(-1, (-1, 8)).transpose(-2, -3)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    q, k, v = (heads(layer, x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k, v = rotated(q), rotated(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    pk, pv = (heads(one, module.prompt).repeat_interleave(2, 0) for one in (attention.k_proj, attention.v_proj))  # type: ignore[arg-type]
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    tokens = (q @ k.mT / 8**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
    gate = torch.tanh(module.gate).repeat_interleave(2)[:, None, None]  # type: ignore[arg-type]
    prompt = (q @ pk.mT / 8**0.5).softmax(-1) * gate
    expected = torch.cat([prompt, tokens], -1) @ torch.cat([pv.expand(2, -1, -1, -1), v], -2)
    assert torch.allclose(found, expected.transpose(1, 2).flatten(2), atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_generation_is_uncached(attention: str) -> None:
    base = llama(attention)
    moved(base, LlamaAdapter(length=4))
    run = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = base.generate(ids(), use_cache=True, **run)
    assert torch.equal(cached, base.generate(ids(), use_cache=False, **run))
    with ak.Adapters(base).disabled():
        assert not torch.equal(cached, base.generate(ids(), **run))


def test_padding_changes_nothing() -> None:
    base = llama()
    moved(base, LlamaAdapter(length=4))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    padded = base(ids(), attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    assert torch.allclose(padded[0, 3:], base(ids()[:1, 3:]).logits[0], atol=1e-5)


def test_beside_a_lora_it_goes_through_the_frozen_layers() -> None:
    """The prompt's keys are those of the base: adapters that are trained apart stay apart."""
    base = llama()
    adapters = moved(base, LlamaAdapter(length=4, targets="attn.kv@layer=0"))
    (module,) = adapters.modules("a").values()
    adapters.add("lora", ak.LoRA(rank=2, targets="attn.{k,v}@layer=0"))
    for parameter in adapters.parameters("lora"):
        nn.init.normal_(parameter)
    layer, seen = base.model.layers[0].self_attn, []
    original = type(module).attend
    expected = [one.weight @ module.prompt.mT for one in (layer.k_proj, layer.v_proj)]  # type: ignore[union-attr]

    def watch(self: Any, query: Tensor, keys: Tensor, values: Tensor, base: Any) -> Tensor:
        seen.extend(base.project(self.prompt))
        return original(self, query, keys, values, base)

    type(module).attend = watch  # type: ignore[method-assign,assignment]
    try:
        adapters.activate(["a", "lora"])
        base(ids())
    finally:
        type(module).attend = original  # type: ignore[method-assign]
    for found, one in zip(seen, expected, strict=True):
        assert torch.allclose(found.transpose(-2, -3).flatten(-2).mT, one, atol=1e-6)


def test_where_the_layers_are_not_known() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        in_channels=4,
    )
    with pytest.raises(errors.IncompatibleTargetError, match="are not known"):
        ak.Adapters(model).add("a", LlamaAdapter())


@pytest.mark.parametrize(("name", "value"), [("length", 0), ("length", True), ("length", 1.5), ("gate", "head")])
def test_wrong_values(name: str, value: Any) -> None:
    with pytest.raises(errors.ConfigError, match=name):
        LlamaAdapter(**{name: value})
