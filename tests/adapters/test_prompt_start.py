"""Prompts that start from the vocabulary."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

import adapterkit as ak
from adapterkit import errors
from adapterkit.handle.starting import _embedding
from adapterkit.points import TokensLayout, TokensPoint, WeightLayout, WeightPoint
from adapterkit.testing import toys

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 11,
}  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def decoder(name: str) -> t.PreTrainedModel:
    torch.manual_seed(0)
    if name.startswith("Gemma2"):  # it multiplies by the root of its width
        size = {**SMALL, "hidden_size": 4} if name == "Gemma2 by 2" else SMALL
        return t.Gemma2ForCausalLM(t.Gemma2Config(**size, num_key_value_heads=1, head_dim=8, pad_token_id=0)).eval()
    return t.LlamaForCausalLM(t.LlamaConfig(**SMALL, num_key_value_heads=1)).eval()


def prompt(adapters: ak.Adapters, **options: Any) -> Tensor:
    adapters.add("p", ak.Prompt(init="vocabulary", **options))
    [module] = adapters.modules("p").values()
    assert not module.training
    return module.prompt.detach()  # type: ignore[union-attr,operator,return-value]


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Gemma2 by 2"])
def test_it_starts_as_the_words_themselves(name: str) -> None:
    model = decoder(name)
    adapters = ak.Adapters(model)
    rows = prompt(adapters, length=5, init_ids=(9, 3))
    words = torch.tensor([[9, 3, 9, 3, 9]])
    assert torch.equal(rows, model.get_input_embeddings()(words)[0])  # scaled as the model scales them
    found = model(IDS).logits
    with adapters.disabled():
        expected = model(torch.cat([words.expand(2, -1), IDS], dim=1)).logits[:, 5:]
    assert torch.allclose(found, expected, atol=1e-5)


def test_any_words_by_the_seed() -> None:
    model = decoder("Llama")
    adapters = ak.Adapters(model)
    rows = prompt(adapters, length=4)
    table = model.get_input_embeddings().weight
    found = [int((table == row).all(1).nonzero()) for row in rows]  # type: ignore
    assert len(set(found)) > 1
    adapters.remove("p")
    assert torch.equal(prompt(adapters, length=4), rows)
    adapters.add("q", ak.Prompt(init="vocabulary", length=4), seed=1)
    [other] = adapters.modules("q").values()
    assert not torch.equal(other.prompt, rows)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_it_is_pefts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", *"abcdefghij"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    t.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(tmp_path)
    model = decoder("Llama")
    text = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prompt_tuning_init="TEXT", prompt_tuning_init_text="h c",
        tokenizer_name_or_path=str(tmp_path),
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), text).eval()
    adapters = ak.Adapters(model)
    rows = prompt(adapters, length=5, init_ids=(words["h"], words["c"]))
    assert torch.equal(rows, theirs.prompt_encoder["default"].embedding.weight)
    mask = torch.ones_like(IDS)
    found, expected = model(IDS, attention_mask=mask).logits, theirs(IDS, attention_mask=mask).logits[:, 5:]
    assert torch.allclose(found, expected, atol=1e-6)


def test_it_is_saved_and_needs_no_start_from_a_file(tmp_path: Path) -> None:
    adapters = ak.Adapters(decoder("Llama"))
    rows = prompt(adapters, length=3, init_ids=(4,))
    path = adapters.save("p", tmp_path / "p.safetensors")
    adapters.load(path, "q")
    [module] = adapters.modules("q").values()
    assert torch.equal(module.prompt, rows)  # type: ignore[arg-type]
    assert adapters.config("q") == ak.Prompt(init="vocabulary", length=3, init_ids=(4,))


def test_a_norm_starts_from_its_own_values() -> None:
    model = decoder("Llama")
    model.model.norm.weight.data.normal_()
    adapters = ak.Adapters(model)
    adapters.add("n", ak.Trainable("norm"))
    assert any(torch.equal(module.weight, model.model.norm.weight) for module in adapters.modules("n").values())  # type: ignore


def test_what_cannot_start_so_is_refused() -> None:
    adapters = ak.Adapters(decoder("Llama"))
    with pytest.raises(errors.ConfigError, match="the vocabulary has 11 tokens, and init_ids names 11"):
        prompt(adapters, init_ids=(3, 11))
    assert list(adapters) == []
    vision = t.ViTModel(
        t.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16, patch_size=8)
    )
    with pytest.raises(
        errors.IncompatibleTargetError, match="token embedding, and ViTModel has none with 16 features for prompt@"
    ):
        ak.Adapters(vision).add("p", ak.Prompt(init="vocabulary"))


def test_values_that_are_not_there_on_meta() -> None:
    with torch.device("meta"):
        model = decoder("Llama")
    ak.Adapters(model).add("p", ak.Prompt(init="vocabulary"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "vocabluary"}, "Did you mean 'vocabulary'"),
        ({"init_ids": (1,)}, "for init='vocabulary'"),
        ({"init": "vocabulary", "init_ids": ()}, "at least one token"),
        ({"init": "vocabulary", "init_ids": (-1,)}, "whole numbers from 0"),
        ({"init": "vocabulary", "init_ids": 3}, "init_ids must be tuple"),
        ({"init": "vocabulary", "reparam": "mlp"}, "a network makes them"),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    toys.register()
    with pytest.raises(errors.ConfigError, match=message):
        ak.Prompt(**options)


def test_of_several_tables_the_nearest_is_taken() -> None:
    def table(path: str, features: int = 16) -> WeightPoint:
        return WeightPoint("embed.tokens", path, "", 11, features, WeightLayout("embedding"))

    others = [
        table("model.encoder.embed", 8),
        WeightPoint("head", "model.encoder.head", "", 16, 16, WeightLayout("linear")),
    ]
    mapped: Any = SimpleNamespace(points=lambda: [*tables, *others], label="a model")
    tables = [table("model.encoder.embed"), table("model.decoder.embed"), table("embed")]
    for path, expected in (("model.encoder.norm", 0), ("model.decoder", 1), ("model.decoder.blocks.0", 1)):
        point = TokensPoint("tokens", path, "", 16, 16, TokensLayout())
        assert _embedding("Prompt", point, mapped) is tables[expected]
        tables.reverse()
        assert _embedding("Prompt", point, mapped) is tables[2 - expected]
        tables.reverse()
