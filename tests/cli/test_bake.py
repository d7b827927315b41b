"""`bake RUN OUT` of runs on language: what plain libraries load computes what the run's adapter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import adapterkit as ak
from adapterkit.cli.main import main
from adapterkit.training.language.embedding.sentence_files import sentence_pooling
from adapterkit.training.loop import train
from tests.training.language import tiny
from tests.training.language.test_classification import bert

ASKED = [{"role": "user", "content": "the cat"}]
CHATS = [{"messages": [*ASKED, {"role": "assistant", "content": said}]} for said in ("sat", "ran far")]
PAIRS = [{"prompt": "the cat", "chosen": "sat", "rejected": said} for said in ("ran", "no")]
TEXTS = [{"text": "the cat sat", "label": "cat"}, {"text": "the dog ran", "label": "dog"}] * 2
RELATED = [{"anchor": "the cat", "positive": "sat"}, {"anchor": "the dog", "positive": "ran"}]


def bake(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["bake", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def adapted(model: Any, run: Path, weight: float = 1.0) -> Any:
    adapters = ak.Adapters(model.eval())
    adapters.load(run / "adapter.safetensors", "mine")
    adapters.activate({"mine": weight})
    return model


@pytest.mark.parametrize(("task", "rows"), [("causal-lm", CHATS), ("preference", PAIRS)])
def test_a_language_model_is_baked_with_its_tokenizer_template_and_settings(
    tmp_path: Path, task: str, rows: list[dict[str, Any]]
):
    base = tiny.llama(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 4], "max_new_tokens": 3}))
    data = tiny.rows_to(tmp_path / "data.jsonl", *rows)
    more: dict[str, Any] = {"task": task, "chat_template": "turns", "validation_fraction": 0}
    train(tiny.run_of(base, data, tmp_path / "run", "steps=3", **more), silent=True)
    out = tmp_path / "baked"
    assert "read back by its own library" in bake(tmp_path / "run", out, "--weight", 0.5)
    plain, tokens = AutoModelForCausalLM.from_pretrained(out).eval(), torch.tensor([[8, 6, 9, 6, 11]])
    with torch.no_grad():
        expected = adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run", 0.5)(tokens).logits
        assert torch.allclose(plain(tokens).logits, expected, atol=1e-5)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base).eval()(tokens).logits, expected, atol=1e-3)
    assert plain.generation_config.eos_token_id == [0, 4]
    words = AutoTokenizer.from_pretrained(out)
    assert words.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True) == "User: the cat\nAssistant: "


def test_a_tokenizers_own_templates_stay_as_they_are(tmp_path: Path):
    base, words = tiny.llama(tmp_path / "base"), tiny.tokenizer()
    words.chat_template = {"default": tiny.BY_ROLE, "tool_use": "tools"}
    words.save_pretrained(base)
    data = tiny.rows_to(tmp_path / "data.jsonl", *CHATS)
    train(tiny.run_of(base, data, tmp_path / "run", "steps=1", validation_fraction=0), silent=True)
    bake(tmp_path / "run", tmp_path / "baked")
    assert AutoTokenizer.from_pretrained(tmp_path / "baked").chat_template == words.chat_template


def test_a_classifier_of_texts_is_baked_with_its_head_and_classes(tmp_path: Path):
    data = tiny.rows_to(tmp_path / "data.jsonl", *TEXTS)
    run = tiny.run_of(bert(tmp_path / "base"), data, tmp_path / "run", "steps=5", task="text-classification")
    train(run, silent=True)
    bake(tmp_path / "run", tmp_path / "baked")
    plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "baked").eval()
    assert plain.config.id2label == {0: "cat", 1: "dog"}
    told = CliRunner().invoke(main, ["predict", str(tmp_path / "run"), str(data), "--json", "--top", "2"])
    words = AutoTokenizer.from_pretrained(tmp_path / "baked")
    for row, told_row in zip(TEXTS, json.loads(told.stdout), strict=True):
        with torch.no_grad():
            shares = plain(words(row["text"], return_tensors="pt")["input_ids"]).logits[0].softmax(-1)
        assert shares.tolist() == pytest.approx([told_row["classes"]["cat"], told_row["classes"]["dog"]], abs=1e-5)


def test_a_model_of_embeddings_is_baked_with_its_pooling(tmp_path: Path):
    base, data = bert(tmp_path / "base"), tiny.rows_to(tmp_path / "data.jsonl", *RELATED)
    (base / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    more: dict[str, Any] = {"task": "text-embedding", "pooling": "cls", "validation_fraction": 0}
    train(tiny.run_of(base, data, tmp_path / "run", "steps=3", **more), silent=True)
    out = tmp_path / "baked"
    bake(tmp_path / "run", out)
    tokens = torch.tensor([[8, 6, 9, 6, 11]])
    with torch.no_grad():
        found = AutoModel.from_pretrained(out).eval()(tokens).last_hidden_state
        expected = adapted(AutoModel.from_pretrained(base), tmp_path / "run")(tokens).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)
    assert sentence_pooling(str(out)) == "cls"
    modules = json.loads((out / "modules.json").read_text())
    assert [one["type"] for one in modules] == [
        f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")
    ]
    assert all((out / one["path"]).is_dir() for one in modules)
    assert (out / "sentence_bert_config.json").read_text() == '{"max_seq_length": 16}'


def test_what_is_not_merged_writes_nothing(tmp_path: Path):
    data = tiny.rows_to(tmp_path / "data.jsonl", *CHATS)
    more: dict[str, Any] = {"chat_template": "turns", "validation_fraction": 0}
    given = ["steps=1", "adapter={type: prefix, length: 2}"]
    train(tiny.run_of(tiny.llama(tmp_path / "base"), data, tmp_path / "run", *given, **more), silent=True)
    result = CliRunner().invoke(main, ["bake", str(tmp_path / "run"), str(tmp_path / "baked")])
    assert result.exit_code == 1
    assert "acts on a sublayer's attention, not on a weight" in result.stderr
    assert not list(tmp_path.glob("*baked*"))


@pytest.mark.parametrize("flag", ["--lenient", "--allow-pickle"])
def test_what_is_said_of_an_adapters_file_is_not_for_runs(tmp_path: Path, flag: str):
    result = CliRunner().invoke(main, ["bake", str(tmp_path), str(tmp_path / "out"), flag])
    assert result.exit_code == 2
    assert "belong to MODEL ADAPTER OUT" in result.stderr
