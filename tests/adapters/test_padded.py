"""Adapters whose positions count padding, and the tokens' own positions behind a prefix, as PEFT computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit import errors
from tests.backends import language_models as models

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 4, 5, 6, 7], [1, 1, 8, 9, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
MODELS = ["Llama", "GPT2"]


def moved(adapters: ak.Adapters, config: ak.AdapterConfig) -> list[Any]:
    adapters.add("a", config)
    for parameter in adapters.parameters("a"):
        parameter.data.normal_()
    return list(adapters.modules("a").values())


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    return model(**inputs).logits


def close(found: Tensor, expected: Tensor) -> bool:
    return (found - expected).abs().max().item() <= 1e-5 * expected.abs().max().item()


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_stands_in_front_of_padding(name: str) -> None:
    model = models.build(name)
    adapters = ak.Adapters(model)
    (module,) = moved(adapters, ak.Prompt(length=3, padded=True))
    found = logits(model, input_ids=IDS, attention_mask=MASK)
    with adapters.disabled(), torch.no_grad():
        embeds = model.get_input_embeddings()(IDS)
        longer = torch.cat([module.prompt.expand(2, -1, -1).to(embeds), embeds], dim=1)
        mask = torch.cat([MASK.new_ones(2, 3), MASK], dim=1)
        expected = logits(model, inputs_embeds=longer, attention_mask=mask)[:, 3:]
    seen = MASK.bool()
    assert close(found[seen], expected[seen])


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_counts_as_positions(name: str) -> None:
    """As a cache that was filled before, whose keys are the prefix's."""
    model = models.build(name)
    adapters = ak.Adapters(model)
    modules = moved(adapters, ak.Prefix(length=3, counted=True, padded=True))
    found = logits(model, input_ids=IDS, attention_mask=MASK)
    with adapters.disabled():
        cache = transformers.DynamicCache()
        for layer, module in enumerate(modules):
            keys, values = (part.expand(2, -1, -1, -1).to(model.dtype) for part in module.prefix())
            cache.update(keys, values, layer)
        mask = torch.cat([MASK.new_ones(2, 3), MASK], dim=1)
        expected = logits(model, input_ids=IDS, attention_mask=mask, past_key_values=cache)
    seen = MASK.bool()
    assert close(found[seen], expected[seen])


@pytest.mark.parametrize("config", [ak.Prompt(length=3), ak.Prefix(length=3), ak.Prefix(length=3, counted=True)])
def test_by_default_padding_changes_nothing(config: ak.AdapterConfig) -> None:
    model = models.build("Llama")
    moved(ak.Adapters(model), config)
    found = logits(model, input_ids=IDS, attention_mask=MASK)[1, 2:]
    alone = logits(model, input_ids=IDS[1:, 2:])[0]
    assert close(found, alone)


@pytest.mark.parametrize(
    "config",
    [ak.Prompt(length=3, padded=True), ak.Prefix(length=3, counted=True, padded=True)],
    ids=["prompt", "prefix"],
)
@pytest.mark.parametrize("name", MODELS)
def test_cached_generation_is_uncached(name: str, config: ak.AdapterConfig) -> None:
    model = models.build(name)
    moved(ak.Adapters(model), config)
    run = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": MASK}
    cached, uncached = (model.generate(IDS, use_cache=use, **run) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_rows_without_the_prompt_are_the_base() -> None:
    model = models.build("Llama")
    adapters = ak.Adapters(model)
    moved(adapters, ak.Prompt(length=3, padded=True))
    with adapters.disabled():
        base = logits(model, input_ids=IDS, attention_mask=MASK)
    with adapters.routed([None, "a"]):
        found = logits(model, input_ids=IDS, attention_mask=MASK)
    assert close(found[0], base[0])
    assert not torch.allclose(found[1, 2:], base[1, 2:])


@pytest.mark.parametrize("cls", [ak.Prompt, ak.Prefix])
def test_wrong_values(cls: Any) -> None:
    with pytest.raises(errors.ConfigError, match="padded must be bool"):
        cls(padded=1)


def test_a_union_is_as_its_members() -> None:
    model = models.build("Llama")
    adapters = ak.Adapters(model)
    prefix = ak.Prefix(length=3, counted=True, padded=True)
    moved(adapters, ak.Union((prefix, ak.LoRA(rank=2, targets="attn.q"))))
    for key, module in adapters.modules("a").items():
        for member in module.members.values():  # type: ignore[union-attr,operator]
            assert member.at == key
            assert (module.front, module.padded) == (member.front, member.padded)
