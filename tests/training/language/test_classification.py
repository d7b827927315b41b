"""Classes of texts: encoders and decoders, fresh heads and the model's own, rows of every manner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import adapterkit as ak
from adapterkit.cli.main import main
from adapterkit.errors import ConfigError, DataError
from adapterkit.training.checked import CheckedTask
from adapterkit.training.data_record import DataRecord
from adapterkit.training.language.labelled import scores
from adapterkit.training.loop import train
from adapterkit.training.parts import inference
from adapterkit.training.plan import parts_of_adapter
from adapterkit.training.task import Setting
from tests.training.language import tiny

SIZES: dict[str, Any] = {
    "vocab_size": len(tiny.WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip


def bert(folder: Path, labels: list[str] | None = None) -> Path:
    """An encoder without the pooler that its classifier has; or a classifier, where there are labels."""
    tiny.tokenizer(pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(**SIZES)
    if labels is None:
        BertForMaskedLM(config).save_pretrained(folder)
    else:
        config.id2label = dict(enumerate(labels))
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    tiny.tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "pad_token_id": None})).save_pretrained(folder)
    return folder


def sentences(folder: Path) -> Path:
    """Of cats, and of dogs."""
    rows = [
        {"sentence": f"the {animal} {verb}{end}", "label": f"a {animal}"}
        for animal in ("dog", "cat")
        for verb in ("sat", "ran")
        for end in ("", " far", " the", " why", " no far")
    ]
    return tiny.rows_to(folder / "rows.jsonl", *rows)


@pytest.mark.parametrize("make", [bert, llama])
def test_a_fresh_head_is_trained_saved_and_read_again(tmp_path: Path, make: Any):
    model, data = make(tmp_path / "model"), sentences(tmp_path)
    run = tiny.run_of(model, data, tmp_path / "run", task="text-classification", validation_fraction=0.2)
    record = CheckedTask(run).survey(None)
    assert record.facts["classes"] == "a cat 10, a dog 10"
    assert record.facts["examples"] == "16, and 4 to measure with"
    run = tiny.run_of(model, data, tmp_path / "run", "bake=true", task="text-classification", validation_fraction=0.2)
    result = train(run, silent=True)
    baked: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    assert baked.config.id2label == {0: "a cat", 1: "a dog"}
    text = AutoTokenizer.from_pretrained(tmp_path / "run/model")("the dog sat far", return_tensors="pt")
    assert baked(text["input_ids"]).logits.argmax() == 1
    asked = tmp_path / "new.csv"
    asked.write_text("sentence\nthe dog ran\nthe cat sat far\n")
    told = CliRunner().invoke(main, ["predict", str(tmp_path / "run"), str(asked), "--json"])
    assert told.exit_code == 0, told.output
    assert [(row["file"], row["class"]) for row in json.loads(told.output)] == [
        (f"{asked}:1", "a dog"),
        (f"{asked}:2", "a cat"),
    ]
    assert result.figures["accuracy"] == result.figures["f1"] == 1
    assert result.figures["classes"] == ["a cat", "a dog"]
    task: Any = run.make_task()
    task.survey(None)
    again = task.load_model()
    task.prepare(Setting(again, torch.device("cpu"), ak.points(again, adapter=run.adapter)))
    ak.Adapters(again).load(tmp_path / "run/adapter.safetensors", "a")
    ak.Adapters(again).activate("a")
    with inference(again):
        assert task.evaluate()["loss"] == pytest.approx(result.figures["loss"], rel=1e-5)


def test_a_written_tokenizer_cuts_no_texts(tmp_path: Path):
    data = tiny.rows_to(tmp_path / "rows.jsonl", *({"text": "the cat sat far", "label": label} for label in "ab"))
    options = {"task": "text-classification", "validation_fraction": 0, "block_size": 3}
    run = tiny.run_of(llama(tmp_path / "model"), data, tmp_path / "run", "steps=1", "bake=true", **options)
    assert not train(run, silent=True).failed
    assert json.loads((tmp_path / "run/model/tokenizer.json").read_text())["truncation"] is None


def test_a_text_without_a_token_is_told_and_not_computed_with(tmp_path: Path):
    data = tiny.rows_to(tmp_path / "rows.jsonl", *({"text": text, "label": text} for text in ("cat", "dog")))
    options = {"task": "text-classification", "validation_fraction": 0}
    run = tiny.run_of(llama(tmp_path / "model"), data, tmp_path / "run", **options)
    task: Any = run.make_task()
    task.survey(None)
    task.load_model()
    asked = tiny.rows_to(tmp_path / "asked.jsonl", {"text": ""}, {"text": "the cat"})
    with torch.no_grad():
        empty, other = task.predict([asked])
    assert empty.problem == "row 1 has a text without a token"
    assert not other.problem
    tiny.rows_to(data, {"text": "cat", "label": 0}, {"text": "dog", "label": 1}, {"text": "", "label": 1})
    with pytest.raises(DataError, match="makes no token: 1; remove"):
        run.make_task().survey(None)


def test_what_the_checkpoint_lacks_is_trained_too(tmp_path: Path):
    run = tiny.run_of(bert(tmp_path / "model"), sentences(tmp_path), tmp_path / "run", task="text-classification")
    task: Any = run.make_task()
    task.survey(None)
    task.load_model()
    assert task.also() == [ak.Trainable(targets="path:classifier path:bert.pooler.dense")]


def test_what_the_adapter_trains_already_is_not_trained_beside_it(tmp_path: Path):
    """Of the two fresh layers the one that is left."""
    run = tiny.run_of(
        bert(tmp_path / "model"),
        sentences(tmp_path),
        tmp_path / "run",
        "adapter={type: trainable, targets: head norm}",
        task="text-classification",
    )
    task: Any = run.make_task()
    task.survey(None)
    (own, points), (beside, left) = parts_of_adapter(run, task.load_model(), task)
    assert own == run.adapter
    assert {point.path for point in points} >= {"classifier"}
    assert [point.path for point in left] == ["bert.pooler.dense"]
    assert [*beside.settings] == [point.id for point in left]


def test_the_loss_is_that_of_each_text_by_itself(tmp_path: Path):
    run = tiny.run_of(
        llama(tmp_path / "model"),
        sentences(tmp_path),
        tmp_path / "run",
        task="text-classification",
        label_smoothing=0.1,
    )
    task: Any = run.make_task()
    task.survey(None)
    model = task.load_model()
    items = task.split[0][:6]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([one.inputs["input_ids"]])).logits for one in items])
        expected = F.cross_entropy(logits, torch.tensor([one.label for one in items]), label_smoothing=0.1)
        assert task.loss(task.collate(items)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_head_that_stays_says_which_class_is_which(tmp_path: Path):
    model = bert(tmp_path / "model", ["a dog", "A_cat"])
    values: dict[str, Any] = {"task": "text-classification", "train_head": False}
    task: Any = tiny.run_of(model, sentences(tmp_path), tmp_path / "run", **values).make_task()
    assert task.survey(None).classes == ["a dog", "a cat"]
    assert task.split[0][0].label == 0
    task.load_model()
    assert not task.also()
    other: Any = tiny.run_of(bert(tmp_path / "other", ["x", "y"]), sentences(tmp_path), tmp_path, **values).make_task()
    with pytest.raises(ConfigError, match="the model's classes are x, y, and the data's a cat, a dog; set it to true"):
        other.survey(None)


def test_a_resumed_run_keeps_the_numbers_of_the_classes(tmp_path: Path):
    run = tiny.run_of(bert(tmp_path / "model"), sentences(tmp_path), tmp_path / "run", task="text-classification")
    record = run.make_task().survey(DataRecord(classes=["a dog", "a cat"]))
    assert record.classes == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": "a", "label": "x"}] * 3, "two or more classes are needed; the labels are all x"),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": ["y"]}],
            "row 2 must have a name or a number",
        ),
        ([{"text": "a", "label": 1}] * 2 + [{"text": "b", "label": 0}], "class '0' has 1 text; two are needed"),
        ([{"text": "a", "label": 1}, {"text": "b"}], "row 2 has no 'label'"),
    ],
)
def test_rows_without_classes(tmp_path: Path, rows: list[Any], reason: str):
    data = tiny.rows_to(tmp_path / "rows.jsonl", *rows)
    run = tiny.run_of(bert(tmp_path / "model"), data, tmp_path / "run", task="text-classification")
    with pytest.raises(DataError, match=reason):
        run.make_task().survey(None)


def test_pairs_cut_texts_and_a_file_to_measure_with(tmp_path: Path):
    data = tmp_path / "rows.csv"
    data.write_text("sentence1,sentence2,label\nthe cat sat,no,10\nthe dog,yes,9\n")
    measure = tiny.rows_to(tmp_path / "m.jsonl", {"text": "the dog", "text_pair": "why", "label": 9})
    values: dict[str, Any] = {"task": "text-classification", "validation": str(measure), "block_size": 4}
    task: Any = tiny.run_of(bert(tmp_path / "model"), data, tmp_path / "run", **values).make_task()
    record = task.survey(None)
    assert record.classes == ["9", "10"]
    assert record.facts["examples"] == "2, and 1 to measure with"
    assert "cut after 4 tokens: 1 texts" in record.notes
    assert [len(one) for one in task.split[0]] == [4, 4]
    tiny.rows_to(measure, {"text": "the dog", "text_pair": "why", "label": 8})
    with pytest.raises(DataError, match="labels that the training data does not have: 8"):
        tiny.run_of(tmp_path / "model", data, tmp_path / "run", **values).make_task().survey(None)


def test_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    found, labels = (torch.randint(4, (50,), generator=generator) for _ in range(2))
    expected = {"accuracy": accuracy_score(labels, found), "f1": f1_score(labels, found, average="macro")}
    assert scores(found, labels, 5) == pytest.approx(expected)
