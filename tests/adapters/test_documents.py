"""Padding, and several documents in a row: each document is what it is alone. And models that run out of positions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit import errors
from adapterkit.kernels.packed_documents import Documents, by_lengths, by_mask, by_positions
from adapterkit.testing import toys
from tests.adapters.test_prompt import SMALL, decoder, seq2seq
from tests.values import randomize

t = pytest.importorskip("transformers")
FIRST, SECOND, THIRD = (toys.ids(batch=1, length=n, seed=n) for n in (6, 5, 1))
PACKED = torch.cat([FIRST, SECOND, THIRD], dim=1)
POSITIONS = torch.cat([torch.arange(n) for n in (6, 5, 1)])[None]
TYPES = {
    "prompt": ak.Prompt(length=3),
    "reft": ak.ReFT(rank=2, prefix=2, suffix=1, tied=False),
    "prefix": ak.Prefix(length=3),
}


def adapted(model: Any, *configs: ak.AdapterConfig) -> ak.Adapters:
    adapters = ak.Adapters(model)
    for number, (name, config) in enumerate(zip("ab", configs, strict=False)):
        adapters.add(name, config)
        randomize(adapters, name, number)
    return adapters


def alone(model: Any, *documents: Tensor) -> Tensor:
    return torch.cat([model(document).logits for document in documents], dim=1)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "reft"])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2", "NeoX", "Mixtral"])
def test_a_packed_document_is_the_document_alone(name: str, kind: str) -> None:
    model = decoder(name)
    adapted(model, TYPES[kind])
    y = model(PACKED, position_ids=POSITIONS, use_cache=False, output_hidden_states=True)
    assert close(y.logits, alone(model, FIRST, SECOND, THIRD))
    assert {h.shape[1] for h in y.hidden_states} == {12}
    rows = torch.cat([PACKED, torch.cat([SECOND, FIRST, THIRD], dim=1)])  # another number of documents in each row
    positions = torch.cat([POSITIONS, torch.cat([torch.arange(5), torch.arange(7)])[None]])
    y = model(rows, position_ids=positions, use_cache=False).logits
    assert close(y[:1], alone(model, FIRST, SECOND, THIRD))
    assert close(y[1:], alone(model, SECOND, torch.cat([FIRST, THIRD], dim=1)))


@pytest.mark.parametrize("kind", ["prompt", "reft"])
def test_packed_rows_of_their_own(kind: str) -> None:
    model = decoder("Llama")
    adapters = adapted(model, TYPES[kind], TYPES[kind] if kind == "reft" else ak.Prompt(length=2))
    with adapters.routed(["a", None, "b"]):
        y = model(PACKED.expand(3, -1), position_ids=POSITIONS, use_cache=False).logits
    for row, route in zip(y, ("a", None, "b"), strict=True):
        with adapters.activated(route):
            assert close(row, alone(model, FIRST, SECOND, THIRD)[0])


def test_packed_documents_learn_and_are_recomputed() -> None:
    model = decoder("Llama")
    gradients: list[Any] = []
    adapters = adapted(model, ak.Prompt(length=3), ak.ReFT(rank=2, suffix=2))
    for choice in ("a", "b"):
        adapters.activate(choice)
        adapters.train(choice)
        for again in (False, True):
            if again:
                model.activation_checkpointing_enable({"use_reentrant": False})
            model.train(again)
            cached = {} if again else {"use_cache": False}  # recomputing keeps no cache, whatever the config says
            model(PACKED, position_ids=POSITIONS, labels=PACKED, **cached).loss.backward()
            gradients.append([p.grad for p in adapters.parameters(choice)])
            for parameter in adapters.parameters():
                parameter.grad = None
        model.activation_checkpointing_disable()
    for one, two in (gradients[:2], gradients[2:]):
        assert all(close(a, b) and a.abs().sum() > 0 for a, b in zip(one, two, strict=True))


def test_documents_by_a_mask_of_blocks() -> None:
    model = decoder("Llama")
    adapters = adapted(model, TYPES["reft"], TYPES["prompt"])
    number = by_positions(POSITIONS).number[0]
    seen = (number[:, None] == number) & torch.ones(12, 12, dtype=torch.bool).tril()
    adapters.activate("a")
    y = model(PACKED, position_ids=POSITIONS, attention_mask=seen[None, None], use_cache=False).logits
    assert close(y, alone(model, FIRST, SECOND, THIRD))
    adapters.activate("b")
    with pytest.raises(errors.StateError, match="two-dimensional"):
        model(PACKED, attention_mask=seen[None, None])


@pytest.mark.parametrize("kind", ["prompt", "reft"])
def test_documents_by_their_lengths(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What flash attention is told, to an attention that computes it plainly."""
    from transformers import DataCollatorWithFlattening
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
        assert mask is None
        assert given["max_length_q"] == given["cu_seq_lens_q"].diff().max()
        sdpa, bounds = ALL_ATTENTION_FUNCTIONS["sdpa"], given["cu_seq_lens_k"].tolist()
        assert bounds[-1] == query.shape[2]
        spans = [slice(*both) for both in itertools.pairwise(bounds)]
        each = [sdpa(module, *(x[:, :, one] for x in (query, key, value)), None, is_causal=True)[0] for one in spans]
        return torch.cat(each, dim=1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_plain", attend)
    model = decoder("Llama")
    adapted(model, TYPES[kind])
    expected = alone(model, FIRST, SECOND, THIRD)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch: Any = collate([{"input_ids": one[0].tolist()} for one in (FIRST, SECOND, THIRD)])
    batch.pop("labels")
    model.config._attn_implementation = "flash_plain"
    assert close(model(**batch).logits, expected)
    batch.pop("position_ids")
    if kind == "reft":
        assert batch["seq_idx"].shape == (1, 12)
        return
    seen: list[Any] = []
    model.model.layers[0].register_forward_pre_hook(lambda m, a, k: seen.append(k["seq_idx"]), with_kwargs=True)
    model(**batch, position_ids=POSITIONS)
    assert torch.equal(seen[0], torch.repeat_interleave(torch.tensor([9, 8, 4]))[None].int())


def test_which_token_is_where() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]])
    for found in (
        by_mask(mask, 6),
        by_mask(mask[:, None, None] != 0, 6),
        by_mask(mask[:, None, None].expand(2, 1, 6, 6) * torch.ones(6, 6).tril().bool(), 6),
        by_mask(torch.where(mask[:, None, None] != 0, 0.0, torch.finfo(torch.float32).min), 6),
        by_mask(mask[:, None, None] == 0, 6, hides=True),
        by_mask(torch.cat([torch.ones(2, 3), mask], dim=1)[:, None, None] != 0, 6),  # behind what a cache holds
    ):
        assert found is not None
        assert found.number.tolist() == mask.tolist()
        assert found.from_start.clamp_max(9).tolist() == [[9, 9, 0, 1, 9, 2], [0, 1, 2, 9, 9, 9]]
        assert found.from_end.clamp_max(9).tolist() == [[9, 9, 2, 1, 9, 0], [2, 1, 0, 9, 9, 9]]
    packed = Documents(torch.tensor([[1, 1, 0, 2, 2, 2]]))
    assert packed.from_start.clamp_max(9).tolist() == [[0, 1, 9, 0, 1, 2]]
    assert packed.from_end.clamp_max(9).tolist() == [[1, 0, 9, 2, 1, 0]]
    assert by_lengths(torch.tensor([0, 2, 5]), 5).number.tolist() == [[1, 1, 2, 2, 2]]
    unfilled = torch.ones(4, 9, dtype=torch.bool).tril()[None, None]  # a cache that does not grow
    assert by_mask(unfilled, 4).number.tolist() == [[1] * 4]  # type: ignore[union-attr]
    assert by_mask(torch.ones(2, 3, 4), 4) is None


DECODERS = ("Llama", "OPT", "Bloom", "Mpt", "Falcon alibi", "Mamba")


@pytest.mark.parametrize("name", [*DECODERS, "ModernBert", "T5 encoder"])
def test_positions_are_counted_without_padding(name: str) -> None:
    model = decoder(name) if name in DECODERS else _encoder(name)
    adapters = adapted(model, TYPES["reft"], TYPES["reft"])
    mask = torch.tensor([[0] * 3 + [1] * 6 + [0] * 2] * 2)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), FIRST, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    y = model(FIRST)[0]
    assert close(model(padded.expand(2, -1), attention_mask=mask)[0][:, 3:9], y.expand(2, -1, -1))
    with adapters.disabled():
        assert not close(model(FIRST)[0], y)
    with adapters.routed(["a", "b"]):
        assert close(model(padded.expand(2, -1), attention_mask=mask)[0][1:, 3:9], y)
    with adapters.activated(ak.Stack("a", "b")):
        assert close(model(padded, attention_mask=mask[:1])[0][:, 3:9], model(FIRST)[0])


def _encoder(name: str) -> Any:
    torch.manual_seed(0)
    if name == "T5 encoder":
        config = t.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=11)
        return t.T5EncoderModel(config).eval()
    modern = {"pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2}
    modern |= dict.fromkeys(("eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 1)
    return t.ModernBertModel(t.ModernBertConfig(**SMALL, **modern)).eval()


@pytest.mark.parametrize(
    "name", ["Llama", "Gemma2", "NeoX", "Mixtral", "Falcon", "Falcon alibi", "Bloom", "ModernBert"]
)
def test_a_prefix_sees_no_padding(name: str) -> None:
    model = _encoder(name) if name == "ModernBert" else decoder(name)
    adapters = adapted(model, ak.Prefix(length=2), TYPES["prefix"])
    mask = torch.tensor([[0] * 3 + [1] * 6 + [0] * 2] * 3)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), FIRST, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    with adapters.disabled():
        base = model(FIRST)[0]
        assert close(model(padded, attention_mask=mask[:1])[0][:, 3:9], base)
    y = model(FIRST)[0]
    assert not close(y, base)
    assert close(model(padded, attention_mask=mask[:1])[0][:, 3:9], y)
    if name == "Llama":  # by place, too
        assert close(model(padded[:, :9], mask[:1, :9])[0][:, 3:], y)
    with adapters.routed(["a", "b", None]):
        rows = model(padded.expand(3, -1), attention_mask=mask)[0][:, 3:9]
    assert close(rows[1:], torch.cat([y, base]))
    adapters.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_prefix_sees_no_padding_beside_a_cache() -> None:
    model = decoder("Llama")
    adapted(model, TYPES["prefix"])
    ids, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), FIRST], dim=1), torch.tensor([[0] * 3 + [1] * 6])
    cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    y = model(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits
    assert close(y, model(FIRST).logits[:, 3:])
    told = torch.arange(9)[None]  # who tells positions is believed
    moved = model(ids, attention_mask=mask, position_ids=told).logits[:, 3:]
    assert not close(moved, model(FIRST).logits)


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_a_prefix_of_a_cross_attention_sees_no_padding(name: str) -> None:
    model = seq2seq(name)
    adapted(model, ak.Prefix(length=3, targets="cross.kv"))
    mask = torch.tensor([[1] * 6 + [0] * 3])
    padded = torch.cat([FIRST, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    y = model(FIRST, decoder_input_ids=SECOND).logits
    assert close(model(padded, attention_mask=mask, decoder_input_ids=SECOND).logits, y)


@pytest.mark.parametrize("additive", [True, False])
def test_documents_in_a_row_of_an_encoder(additive: bool) -> None:
    """A deep prompt takes nothing along; one that goes through all blocks would."""
    model = t.BertModel(t.BertConfig(**SMALL)).eval()
    adapters = adapted(model, ak.Prompt(length=3), ak.Prompt(length=3, targets="prompt.layer"))
    number = by_positions(POSITIONS).number[0]
    mask = (number[:, None] == number)[None, None]
    mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    y = model(PACKED, position_ids=POSITIONS, attention_mask=mask)[0]
    assert close(y, torch.cat([model(one)[0] for one in (FIRST, SECOND, THIRD)], dim=1))
    adapters.activate("a")
    with pytest.raises(errors.StateError, match=r"prompt\.layer"):
        model(PACKED, position_ids=POSITIONS, attention_mask=mask)
    alike = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    assert close(model(FIRST, attention_mask=alike)[0], model(FIRST)[0])


# -- positions that run out -------------------------------------------------------------------------------------------


def short(name: str) -> tuple[Any, int]:
    torch.manual_seed(0)
    opt = {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 11}
    bart = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0, "vocab_size": 11}
    made = {
        "GPT2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11, n_positions=16)),
        "OPT": lambda: t.OPTForCausalLM(t.OPTConfig(**opt, word_embed_proj_dim=16, max_position_embeddings=16)),
        "Mpt": lambda: t.MptForCausalLM(t.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=11, max_seq_len=16)),
        "Bart": lambda: t.BartModel(t.BartConfig(**bart, **heads, max_position_embeddings=16)),
    }
    return made[name]().eval(), 16


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Mpt", "Bart"])
def test_a_prompt_beyond_the_last_position(name: str) -> None:
    model, limit = short(name)
    adapters = adapted(model, ak.Prompt(length=3))
    ids = toys.ids(batch=1, length=limit)
    model(ids[:, : limit - 3])
    told = rf"has {limit} positions, .*of up to {limit - 2} tokens with a prompt of 3 needs {limit + 1}"
    with pytest.raises(errors.LengthError, match=told):
        model(ids[:, : limit - 2])
    with adapters.disabled():
        model(ids)
    if name != "Mpt":  # padding takes no position, of those that are told or counted by the mask
        mask = torch.tensor([[0] * 3 + [1] * (limit - 3)])
        given = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if name == "GPT2" else {}
        if name != "Bart":
            model(ids, attention_mask=mask, **given)


def test_generation_stops_at_the_last_position_and_says_so() -> None:
    model, limit = short("GPT2")
    adapted(model, ak.Prompt(length=3))
    ids = toys.ids(batch=1, length=8)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, max_new_tokens=limit - 3 - 8 + 1, **settings).shape[1] == limit - 2
    with pytest.raises(errors.LengthError, match=f"cut it to {limit - 3} tokens"):
        model.generate(ids, max_new_tokens=limit - 3 - 8 + 2, **settings)
    packed = torch.cat([toys.ids(batch=1, length=13), toys.ids(batch=1, length=14)], dim=1)
    positions = torch.cat([torch.arange(13), torch.arange(14)])[None]
    model(packed[:, :-1], position_ids=positions[:, :-1], use_cache=False)
    with pytest.raises(errors.LengthError, match="needs 17"):
        model(packed, position_ids=positions, use_cache=False)


def test_prompts_behind_the_embeddings_take_no_position() -> None:
    model = t.BertModel(t.BertConfig(**SMALL, max_position_embeddings=16)).eval()
    adapted(model, ak.Prompt(length=3))
    assert model(toys.ids(batch=1, length=16)).last_hidden_state.shape == (1, 16, 16)
