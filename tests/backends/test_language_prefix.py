"""Prefixes in language models: the softmax over prefix and tokens, padding, missing masks, and caches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import adapterkit as ak
from tests.backends.language_models import CAUSAL, EVERY, adapted, build, output, padded, shake, tokens

LAYOUTS = tuple(EVERY)
EXACT = {"rtol": 1e-10, "atol": 1e-10}
PREFIX = ak.Prefix(length=3, init_std=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_is_softmax_over_prefix_and_tokens(layout: str, attention: str) -> None:
    model, adapters = adapted(layout, PREFIX, attention=attention)
    point = adapters.points("attn.kv@layer=1")[0]
    module, prefix = model.get_submodule(point.path), adapters.modules("a")[point.id]
    seen: dict[str, Any] = {}
    module.register_forward_pre_hook(lambda _, a, k: seen.update(x=(*a, *k.values())[0], **k), with_kwargs=True)
    last = model.get_submodule(adapters.points("attn.o@layer=1")[0].path)
    with torch.no_grad():
        last.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
        output(model, tokens())
        expected = plain_attention(layout, module, seen, prefix)
    bound = {"rtol": 1e-5, "atol": 1e-5} if attention == "eager" else EXACT
    torch.testing.assert_close(seen["mixed"], expected, **bound)


def plain_attention(layout: str, module: Any, seen: dict[str, Any], prefix: Any) -> Tensor:
    """softmax(q [P_k; k]^T / sqrt(d)) [P_v; v], written out, for a batch without padding."""
    x = seen["x"]
    if layout == "GPT2":
        q, k, v = module.c_attn(x).chunk(3, dim=-1)
    elif layout == "Bert":
        q, k, v = module.query(x), module.key(x), module.value(x)
    else:
        q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    width = prefix.keys.shape[-1]
    q, k, v = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
    if layout == "Qwen3":
        q, k = module.q_norm(q), module.k_norm(k)
    if layout not in ("GPT2", "Bert"):
        q, k = apply_rotary_pos_emb(q, k, *seen["position_embeddings"])
    batch, heads, length, _ = q.shape
    k = torch.cat([prefix.keys.expand(batch, -1, -1, -1), k], dim=2).repeat_interleave(heads // k.shape[1], dim=1)
    v = torch.cat([prefix.values.expand(batch, -1, -1, -1), v], dim=2).repeat_interleave(heads // v.shape[1], dim=1)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    window = 5 if layout == "Mistral" else length
    visible = torch.ones_like(distance, dtype=torch.bool) if layout == "Bert" else (distance >= 0) & (distance < window)
    visible = torch.cat([visible.new_ones(length, prefix.keys.shape[1]), visible], dim=1)
    scores = (q @ k.mT / math.sqrt(width)).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_real_tokens(layout: str, side: str) -> None:
    model, _ = adapted(layout, PREFIX)
    inputs = padded(side)
    together = output(model, **inputs)
    real = inputs["attention_mask"].bool()
    for row in range(2):
        alone = output(model, inputs["input_ids"][row][real[row]][None])
        torch.testing.assert_close(together[row][real[row]], alone[0], **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_eager_and_sdpa_are_equal(layout: str, masked: bool) -> None:
    inputs = padded("left") if masked else {"input_ids": tokens()}
    real = inputs.get("attention_mask", torch.ones_like(tokens())).bool()
    outputs = [output(adapted(layout, PREFIX, attention=name)[0], **inputs)[real] for name in ("sdpa", "eager")]
    # Llama's own eager attention takes its softmax in float32.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def generated(model: Any, ids: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens, and the logits that chose them [batch, steps, vocabulary]."""
    options = {"use_cache": True, **options}
    mask = {} if mask is None else {"attention_mask": mask}
    result = model.generate(
        ids, **mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return result.sequences, torch.stack(result.logits, dim=1)


@pytest.mark.parametrize("layout", CAUSAL)
@pytest.mark.parametrize("padding", ["left", "none", "no mask"])
def test_cached_generation_with_a_prefix_equals_uncached(layout: str, padding: str) -> None:
    model, _ = adapted(layout, PREFIX)
    inputs = padded("left", short=3 if padding == "left" else 0)
    mask = None if padding == "no mask" else inputs["attention_mask"]
    cached = generated(model, inputs["input_ids"], mask)
    uncached = generated(model, inputs["input_ids"], mask, use_cache=False)
    assert torch.equal(cached[0], uncached[0])
    torch.testing.assert_close(cached[1], uncached[1], **EXACT)


@pytest.mark.parametrize("layout", CAUSAL)
def test_a_static_cache_longer_than_the_prompt_changes_nothing(layout: str) -> None:
    model, _ = adapted(layout, PREFIX)
    ids = tokens()
    expected = generated(model, ids, torch.ones_like(ids))
    actual = generated(model, ids, torch.ones_like(ids), cache_implementation="static", disable_compile=True)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], **EXACT)


@pytest.mark.parametrize(
    ("layout", "head", "changes"),
    [
        ("GPT2", "GPT2LMHeadModel", {"add_cross_attention": True}),
        ("Bert", "BertLMHeadModel", {"add_cross_attention": True, "is_decoder": True}),
    ],
)
def test_cross_attention_takes_a_prefix_of_its_own(layout: str, head: str, changes: dict[str, Any]) -> None:
    model = build(layout, head, **changes)
    encoded = torch.randn(2, 4, 32, dtype=torch.float64)
    inputs = {"encoder_hidden_states": encoded, "encoder_attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    before = output(model, tokens(), **inputs)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Prefix(targets="cross.kv", length=3, init_std=1.0))
    shake(adapters)
    batch = output(model, tokens(), **inputs)
    assert (batch - before).abs().max() > 1e-2
    alone = output(model, tokens()[:1], encoder_hidden_states=encoded[:1, :3])
    torch.testing.assert_close(batch[:1], alone, **EXACT)
    adapters.detach()
    assert torch.equal(output(model, tokens(), **inputs), before)


@pytest.mark.parametrize("layout", CAUSAL)
def test_a_prompt_in_two_parts_and_packed_sequences_keep_their_masks(layout: str) -> None:
    model, _ = adapted(layout, PREFIX)
    ids = tokens()
    whole = output(model, ids)
    cache = DynamicCache(config=model.config)
    parts = [output(model, ids[:, :4], past_key_values=cache), output(model, ids[:, 4:], past_key_values=cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EXACT)
    packed = output(model, ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2), use_cache=False)
    torch.testing.assert_close(packed[:, :3], whole[:, :3], **EXACT)
    torch.testing.assert_close(packed[:, 3:], output(model, ids[:, 3:]), **EXACT)


def test_weighted_prefixes_generate_with_beams_and_cache_as_without() -> None:
    model, adapters = adapted("Llama", PREFIX)
    adapters.add("b", ak.Prefix(length=2, init_std=1.0))
    shake(adapters, "b")
    adapters.activate({"a": 0.5, "b": 1.5})
    inputs = padded("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cached, uncached = (generated(model, ids, mask, num_beams=3, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached[0], uncached[0])


def test_prefix_lora_and_bottleneck_come_off_in_any_order() -> None:
    model, adapters = adapted("GPT2", PREFIX)
    base = output(build("GPT2"), tokens())
    for name, config in (("lora", ak.LoRA(targets="attn.*")), ("net", ak.Bottleneck(targets="attn mlp"))):
        adapters.add(name, config)
        shake(adapters, name)
    adapters.activate(["a", "lora", "net"])
    assert (output(model, tokens()) - base).abs().max() > 1e-2
    for name in ("lora", "a", "net"):
        adapters.remove(name)
    assert torch.equal(output(model, tokens()), base)
