"""Every adapter type on every layout: gradients, merging, checkpointing, detaching, and the equations of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from tests.backends.language_models import EVERY, LAYERS, adapted, build, output, shake, tokens

LAYOUTS = tuple(EVERY)
EXACT = {"rtol": 1e-10, "atol": 1e-10}
TYPES = {
    "lora": ak.LoRA(rank=4, alpha=6.0, targets="*"),
    "bottleneck": ak.Bottleneck(width=5, targets="attn mlp"),
    "prefix": ak.Prefix(length=3, init_std=1.0),
}


def gradients(model: nn.Module, adapters: ak.Adapters) -> list[Tensor]:
    model.zero_grad()
    output(model, tokens()).square().mean().backward()
    return [parameter.grad for parameter in adapters.parameters("a") if parameter.grad is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TYPES)
def test_every_parameter_gets_a_gradient_and_detaching_restores_the_base(layout: str, kind: str) -> None:
    model = build(layout)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    configs = {name: getattr(module, "config", None) for name, module in model.named_modules()}
    before = output(model, tokens())
    adapters = ak.Adapters(model)
    adapters.add("a", TYPES[kind])
    shake(adapters)
    assert (output(model, tokens()) - before).abs().max() > 1e-2
    # A pooler gives no output here, and BERT has no further head; everything else takes part.
    idle = [key for key in adapters.modules("a") if key.startswith("head.pooler")]
    model.zero_grad()
    output(model, tokens()).square().mean().backward()
    for key, module in adapters.modules("a").items():
        assert key in idle or all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters()), key
    assert all(p.grad is None for n, p in model.named_parameters() if "adapterkit" not in n)
    with adapters.disabled():
        assert torch.equal(output(model, tokens()), before)
    adapters.detach()
    assert torch.equal(output(model, tokens()), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(getattr(module, "config", None) is configs[name] for name, module in model.named_modules())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_merged_equals_unmerged_at_every_weight(layout: str, dtype: torch.dtype, bound: float) -> None:
    model, adapters = adapted(layout, TYPES["lora"], dtype=dtype)
    shake(adapters, scale=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        active = output(model, tokens())
        with adapters.merged():
            merged = output(model, tokens())
    assert (merged - active).abs().max() <= bound * active.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TYPES)
def test_gradient_checkpointing_changes_no_gradient(layout: str, kind: str) -> None:
    model, adapters = adapted(layout, TYPES[kind])
    model.train()
    expected = gradients(model, adapters)
    model.activation_checkpointing_enable({"use_reentrant": False})
    actual = gradients(model, adapters)
    assert len(actual) == len(expected) > 0
    torch.testing.assert_close(actual, expected, **EXACT)


def test_gpt2_lora_on_queries_and_values_is_the_equation_on_slices() -> None:
    model, adapters = adapted("GPT2", ak.LoRA(rank=4, alpha=6.0, targets="attn.{q,v}"))
    reference = build("GPT2")
    modules = adapters.modules("a")
    assert len(modules) == 2 * LAYERS
    for layer, block in enumerate(reference.transformer.h):
        for role, columns in (("attn.q", slice(0, 32)), ("attn.v", slice(64, 96))):
            module: Any = modules[f"{role}@language.{layer}"]
            block.attn.c_attn.weight.data[:, columns] += 1.5 * (module.B @ module.A).T
    torch.testing.assert_close(output(model, tokens()), output(reference, tokens()), **EXACT)
    with adapters.merged():
        for ours, theirs in zip(model.transformer.h, reference.transformer.h, strict=True):
            torch.testing.assert_close(ours.attn.c_attn.weight, theirs.attn.c_attn.weight, **EXACT)
            assert torch.equal(ours.attn.c_attn.weight[:, 32:64], theirs.attn.c_attn.weight[:, 32:64])


def bottleneck(module: Any, h: Tensor) -> Tensor:
    return F.linear(torch.relu(F.linear(h, module.down.weight, module.down.bias)), module.up.weight, module.up.bias)


@pytest.mark.parametrize("form", ["pfeiffer", "houlsby", "parallel", "parallel_norm"])
@pytest.mark.parametrize("layout", ["Llama", "GPT2", "Bert"])
def test_a_block_with_bottlenecks_is_their_equation(layout: str, form: str) -> None:
    model, adapters = adapted(layout, ak.Bottleneck(width=5, targets="attn mlp", form=form))
    reference, modules = build(layout), adapters.modules("a")
    seen: dict[str, Any] = {}

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], result: Any) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]
        seen["kwargs"], seen["y"] = kwargs, result[0] if isinstance(result, tuple) else result

    block = blocks_of(model)[1]
    block.register_forward_hook(keep, with_kwargs=True)
    output(model, tokens())
    plain = blocks_of(reference)[1]
    rest = {k: v for k, v in seen["kwargs"].items() if k not in ("hidden_states", "past_key_values")}
    x = seen["x"]
    for name, sublayer, norm in sublayers(layout, plain, rest):
        identity = nn.Identity()
        norm_in, norm_out = (identity, norm) if layout == "Bert" else (norm, identity)
        s = sublayer(norm_in(x))
        h = {"pfeiffer": norm_out(s + x), "houlsby": s, "parallel": x, "parallel_norm": norm_in(x)}[form]
        x = norm_out(s + bottleneck(modules[f"{name}@language.1"], h) + x)
    torch.testing.assert_close(seen["y"], x, **EXACT)


def blocks_of(model: Any) -> Any:
    for path in ("model.layers", "transformer.h", "encoder.layer"):
        if path.split(".")[0] in model._modules:
            return model.get_submodule(path)
    raise AssertionError(type(model))


def sublayers(layout: str, block: Any, rest: dict[str, Any]) -> list[tuple[str, Any, nn.Module]]:
    """The two sublayers of a block without residual and norm, each with its norm."""
    if layout == "Llama":
        attention = ("attn", lambda h: block.self_attn(h, **rest)[0], block.input_layernorm)
        return [attention, ("mlp", block.mlp, block.post_attention_layernorm)]
    if layout == "GPT2":
        return [("attn", lambda h: block.attn(h)[0], block.ln_1), ("mlp", block.mlp, block.ln_2)]
    inner = block.attention
    return [
        ("attn", lambda h: inner.output.dense(inner.self(h)[0]), inner.output.LayerNorm),
        ("mlp", lambda h: block.output.dense(block.intermediate(h)), block.output.LayerNorm),
    ]
