"""transformers' `resize_token_embeddings` after adapters were added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import adapterkit as ak
from adapterkit.errors import ReplacedError, StateError
from tests.values import randomize

SIZES = {"vocab_size": 32, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
IDS = torch.arange(12).view(2, 6)


def built(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**more)
    return {
        "Llama": transformers.LlamaForCausalLM,
        "Bert": transformers.BertForMaskedLM,
        "GPT2": transformers.GPT2LMHeadModel,
        "T5": transformers.T5ForConditionalGeneration,
        "Gemma": transformers.GemmaForCausalLM,
    }[kind](config).eval()


def adapted(model: Any, targets: str) -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets=targets))
    randomize(adapters, "a")
    return adapters


@pytest.mark.parametrize("targets", ["attn.q", "head", "embed.tokens", "embed.tokens head"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Llama", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("Llama", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False}),
        ("Bert", SIZES),
        ("GPT2", {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}),
    ],
    ids=["tied", "untied", "a bias beside", "transposed layers"],
)
@torch.no_grad()
def test_old_logits_are_what_they_were(kind: str, config: dict[str, Any], targets: str) -> None:
    model = built(kind, **config)
    base = model(IDS).logits
    adapters = adapted(model, targets)
    y = model(IDS).logits
    model.resize_token_embeddings(40)
    z = model(IDS).logits
    torch.testing.assert_close(z[..., :32], y, rtol=1e-5, atol=1e-5)
    model(torch.full((1, 3), 39))
    with adapters.merged():
        torch.testing.assert_close(model(IDS).logits, z, rtol=1e-4, atol=1e-4)
    adapters.detach()
    torch.testing.assert_close(model(IDS).logits[..., :32], base, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_embeddings_that_become_one_are_told() -> None:
    model = built("T5", vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    adapters = adapted(model, "embed.tokens")
    model.resize_token_embeddings(40)
    with pytest.raises(ReplacedError, match=r"embed_tokens was replaced by another Embedding after 'a'"):
        model(input_ids=IDS, decoder_input_ids=IDS)
    adapters.detach()
    model(input_ids=IDS, decoder_input_ids=IDS)


@torch.no_grad()
def test_a_resize_that_is_lost_in_what_the_model_reads_is_told() -> None:
    model = built("Gemma", **SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    adapters = adapted(model, "embed.tokens")
    y = model(IDS).logits
    model.resize_token_embeddings(40)
    with pytest.raises(ReplacedError, match=r"resized to 40 rows, and its weight still has 32"):
        model(IDS)
    model.model.embed_tokens.num_embeddings = 32
    with adapters.disabled():
        model.resize_token_embeddings(40)
    torch.testing.assert_close(model(IDS).logits[..., :32], y, rtol=1e-5, atol=1e-5)
    model(torch.full((1, 3), 39))


@pytest.mark.parametrize("targets", ["embed.tokens", "head"])
@pytest.mark.parametrize("again", ["tie_weights", "resize_token_embeddings"])
@torch.no_grad()
def test_a_tie_that_is_made_again_while_it_is_merged_apart_is_told(targets: str, again: str) -> None:
    model = built("GPT2", vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    base = model(IDS).logits
    adapters = adapted(model, targets)
    y = model(IDS).logits
    adapters.merge()
    torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-5)
    getattr(model, again)(*([40] if again == "resize_token_embeddings" else []))
    with pytest.raises((StateError, ReplacedError), match=r"were tied again|was replaced by another Linear"):
        model(IDS)
    if targets == "embed.tokens" or again == "tie_weights":
        adapters.unmerge()
        torch.testing.assert_close(model(IDS).logits[..., :32], y, rtol=1e-5, atol=1e-5)
        with adapters.merged():
            torch.testing.assert_close(model(IDS).logits[..., :32], y, rtol=1e-4, atol=1e-5)
    adapters.detach()
    torch.testing.assert_close(model(IDS).logits[..., :32], base, rtol=1e-5, atol=1e-5)
