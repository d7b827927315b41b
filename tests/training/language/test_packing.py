"""Packed documents have the loss and gradient of each by itself, of models and adapters; what does not fit is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

import adapterkit as ak
from adapterkit.errors import ConfigError
from adapterkit.training.language.apart import check_apart
from adapterkit.training.language.encoded import Counts, Tokens, blocks, fitted
from adapterkit.training.language.lengths import Fitting
from adapterkit.training.language.likelihood import learnt_in, token_losses
from adapterkit.training.language.packing import Lines, collated, line_of, packed
from adapterkit.training.language.shelf import Shelf
from adapterkit.training.language.tokens import Encoded
from adapterkit.training.loading import load_causal_lm
from tests.training.language.tiny import WORDS, gpt2, llama

LENGTHS = (5, 2, 9, 1, 7, 4, 3)


def example(length: int, seed: int = 0, learnt: int = 0) -> Encoded:
    tokens = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return Encoded(tokens, torch.arange(length) >= learnt)


def test_rows_are_full_and_hold_every_example_once():
    rows = list(packed(LENGTHS, 10))
    assert sorted(example for row in rows for example in row) == list(range(len(LENGTHS)))
    assert [sum(LENGTHS[example] for example in row) for row in rows] == [10, 10, 9, 2]
    assert list(packed([10, 10], 10)) == [[0], [1]]


def test_a_batch_says_where_documents_begin_and_what_is_learnt():
    lines = [line_of([example(3, 1), example(2, 2, learnt=1)]), line_of([example(4, 3, learnt=2)])]
    batch = collated(lines, 9, apart=True)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert (batch["labels"] != -100).tolist() == [[False, True, True, False, True], [False, False, True, True, False]]
    assert batch["input_ids"][1, 4] == 9
    assert "attention_mask" not in batch
    alone = collated(lines, 9, apart=False)
    assert alone["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    assert "position_ids" not in alone


ADAPTERS: dict[str, ak.AdapterConfig] = {
    "lora": ak.LoRA(rank=2, targets="linear"),
    "prefix": ak.Prefix(length=3),
    "prompt": ak.Prompt(length=3),
    "bottleneck": ak.Bottleneck(reduction=4),
    "reft": ak.ReFT(rank=2, prefix=1, suffix=2),
}
EXAMPLES = [example(length, seed, learnt=seed % 2) for seed, length in enumerate(LENGTHS)]


def measured(model: Any, adapters: ak.Adapters, rows: Sequence[Sequence[int]], *, apart: bool) -> list[Tensor]:
    """The loss of the examples in these rows, and the gradients of the adapter."""
    batch = collated([line_of([EXAMPLES[number] for number in row]) for row in rows], 0, apart=apart)
    loss = token_losses(model, batch).sum() / learnt_in(batch)
    return [loss.detach(), *torch.autograd.grad(loss, list(adapters.parameters("a")))]


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_loss_and_gradient_are_those_of_documents_by_themselves(tmp_path: Path, make: Any, name: str):
    model: Any = load_causal_lm(str(make(tmp_path)), "float32")[0].double().eval()
    adapters = ak.Adapters(model)
    adapters.add("a", ADAPTERS[name])
    with torch.no_grad():
        for number, parameter in enumerate(adapters.parameters("a")):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    alone = [[number] for number in range(len(EXAMPLES))]
    expected = measured(model, adapters, alone, apart=False)
    for rows in ([*packed(LENGTHS, 12)], [list(range(len(EXAMPLES)))], alone):
        found = measured(model, adapters, rows, apart=True)
        assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(found, expected, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in expected)


def test_logits_are_computed_of_places_where_something_is_learnt(tmp_path: Path):
    model: Any = load_causal_lm(str(llama(tmp_path)), "float32")[0].eval()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    batch = collated([line_of([example(9, 1, learnt=7)]), line_of([example(8, 2, learnt=6)])], 0, apart=False)
    losses = token_losses(model, batch)
    assert seen == [3]
    logs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    for row, place in ((0, 7), (0, 8), (1, 6), (1, 7)):
        expected = -logs[row, place - 1, batch["input_ids"][row, place]]
        assert losses[row, place - 6].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses[0, 0] == losses[1, 2] == 0

    class Whole:
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask)

        __call__ = forward

    assert torch.allclose(token_losses(Whole(), batch), losses, atol=1e-6)


def test_a_model_that_lets_documents_see_each_other_is_found_out(tmp_path: Path):
    check_apart(load_causal_lm(str(llama(tmp_path)), "bfloat16")[0].eval(), torch.device("cpu"))
    numbers: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 16, "n_layer": 1, "n_head": 2}
    with pytest.raises(ConfigError, match=r"BloomForCausalLM does not .* one document changes .*options\.packing=rows"):
        check_apart(BloomForCausalLM(BloomConfig(**numbers)).eval(), torch.device("cpu"))
    state: dict[str, Any] = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "initializer_range": 1.0}
    with pytest.raises(ConfigError, match=r"MambaForCausalLM does not keep .*options\.packing=rows"):
        check_apart(MambaForCausalLM(MambaConfig(vocab_size=len(WORDS), **state)).eval(), torch.device("cpu"))


def shelved(*examples: Encoded) -> Tokens:
    shelf = Shelf.temporary(Path.cwd())
    for row, one in enumerate(examples):
        shelf.append(one.tokens << 1 | one.learnt, row << 1 | one.whole)
    return Tokens(shelf.finish(), Counts())


def test_blocks_are_joined_across_documents():
    found = blocks(shelved(example(5, 1), example(6, 2, learnt=2)), 4)
    whole = torch.cat([example(5, 1).tokens, example(6, 2).tokens])
    assert [block.tokens.tolist() for block in found] == [whole[:4].tolist(), whole[4:8].tolist()]
    assert found[1].learnt.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("way", "lengths", "told"),
    [
        (None, [4, 4, 4, 1], {"split, longer than 4 tokens": 1, "left out, nothing to learn in them": 1}),
        ("cut", [4, 4], {"cut after 4 tokens": 1, "left out, nothing to learn in them": 1}),
        ("leave out", [4], {"left out, longer than 4 tokens": 1, "left out, nothing to learn in them": 1}),
    ],
)
def test_long_documents_are_split_cut_or_left_out_and_told(way: Any, lengths: list[int], told: dict[str, int]):
    fitting = Fitting(4, way)
    long = Encoded(*(getattr(example(10, 1), name) for name in ("tokens", "learnt")), whole=True)
    found = fitted(shelved(example(4), long, example(1)), None, fitting)
    assert fitting.counts == told
    assert [len(one) for one in found][: len(lengths) - (way is None)] == lengths[: len(lengths) - (way is None)]


def test_long_conversations_are_cut_and_left_out_where_nothing_is_learnt():
    fitting = Fitting(4)
    (kept,) = fitted(shelved(example(6, learnt=2), example(6, learnt=4)), None, fitting)
    assert len(kept) == 4
    assert kept.learnt.tolist() == [False, False, True, True]
    assert fitting.notes(2) == [
        "cut after 4 tokens: 1 of 2 examples",
        "left out, nothing to learn in the first 4 tokens: 1 of 2 examples",
    ]


def test_lines_are_drawn_by_number():
    lines = Lines([example(2, 1), example(3, 2), example(4, 3)], [[2, 0], [1]])
    assert len(lines) == 2
    assert lines.line(0).tokens.tolist() == [*example(4, 3).tokens, *example(2, 1).tokens]
