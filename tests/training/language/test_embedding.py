"""Embeddings: pooling, losses and figures against formulas; encoders and decoders that learn what belongs together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from adapterkit.errors import ConfigError, DataError
from adapterkit.training.language.corpus import read_source
from adapterkit.training.language.embedding import objectives
from adapterkit.training.language.embedding.examples import RELATED, Group, belonging, collated
from adapterkit.training.language.embedding.objectives import (
    contrast,
    likeness,
    pooled,
    rank_correlation,
    retrieval,
)
from adapterkit.training.language.embedding.sentence_files import sentence_pooling
from adapterkit.training.loop import train
from tests.training.language import tiny
from tests.training.language.test_classification import bert, llama

MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
HIDDEN = torch.tensor([[[3.0, 4], [1, 0], [2, 2]], [[0, 2], [6, 8], [9, 9]]])


@pytest.mark.parametrize(
    ("pooling", "expected"), [("mean", [[6, 6], [6, 10]]), ("cls", [[3, 4], [0, 2]]), ("last", [[2, 2], [6, 8]])]
)
def test_what_of_the_tokens_is_the_embedding(pooling: Any, expected: list[list[float]]):
    found = pooled(HIDDEN, MASK, pooling)
    lengths = [(x * x + y * y) ** 0.5 for x, y in expected]
    assert torch.allclose(found, torch.tensor(expected) / torch.tensor(lengths)[:, None])


def test_the_loss_tells_an_anchors_text_from_all_others_but_its_own():
    generator = torch.Generator().manual_seed(0)
    anchors, others = (F.normalize(torch.randn(n, 4, generator=generator).double(), dim=-1) for n in (3, 5))
    same = torch.zeros(3, 5, dtype=torch.bool)
    same[0, 0] = same[1, 1] = same[2, 2] = same[0, 3] = True
    found = contrast(anchors, others, same, 0.1)
    expected = 0.0
    for row, left in enumerate(([0, 1, 2, 4], range(5), range(5))):
        chances = {place: torch.exp(anchors[row] @ others[place] / 0.1) for place in left}
        expected -= torch.log(chances[row] / sum(chances.values())) / 3
    assert found.item() == pytest.approx(float(expected))
    scores = torch.tensor([0.1, 0.5, 1.0])
    cosines = [float(anchors[n] @ others[n]) for n in range(3)]
    expected = sum((c - float(s)) ** 2 for c, s in zip(cosines, scores, strict=True)) / 3
    assert likeness(anchors, others[:3], scores).item() == pytest.approx(expected)


def test_figures(monkeypatch: pytest.MonkeyPatch):
    anchors, others = torch.eye(3), torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0.9, 0.9, 0.5]])
    for at_once in (1, 2, 512):
        monkeypatch.setattr(objectives, "_AT_ONCE", at_once)
        rows = [Group(((number,), (5 + number,)), None) for number in range(3)]
        assert retrieval(anchors, others, *belonging(rows)) == pytest.approx({"accuracy": 2 / 3, "mrr": 2.5 / 3})
        rows[2] = Group(((2,), (6,)), None)  # what belongs to the anchor before it as well
        assert retrieval(anchors, others, *belonging(rows)) == pytest.approx({"accuracy": 1, "mrr": 1})
    one, other = torch.tensor([1.0, 2, 2, 5, 3]), torch.tensor([2.0, 1, 4, 4, 9])
    expected: Any = spearmanr(one, other)
    assert rank_correlation(one, other) == pytest.approx(expected[0])


def test_what_belongs_to_an_anchor_is_what_a_batch_says():
    a, b, c, d = (1, 2), (3,), (4,), (5, 6)
    rows = [Group((a, b), None), Group((a, d), None), Group((c, b), None), Group((d, a), None)]
    texts, own = belonging(rows)
    same = torch.stack([torch.isin(texts, torch.tensor(one)) for one in own])
    assert same.tolist() == collated(rows, 9)["same"].tolist()


def test_a_batch_knows_what_belongs_together():
    a, b, c, d = (1, 2), (3,), (4,), (5, 6)
    batch = collated([Group((a, b, c), None), Group((a, d), None), Group((c, b), None)], 9)
    assert batch["input_ids"].tolist() == [[1, 2], [1, 2], [4, 9], [3, 9], [5, 6], [3, 9], [4, 9]]
    assert batch["same"].tolist() == [
        [True, True, True, False],
        [True, True, True, False],
        [True, False, True, True],
    ]
    assert batch["scores"] is None


@pytest.mark.parametrize(("make", "pooling"), [(bert, "mean"), (llama, "last")])
def test_texts_that_belong_together_find_each_other(tmp_path: Path, make: Any, pooling: str):
    words = ["the", "cat", "dog", "sat", "ran", "far", "yes", "no"]
    rows = [{"query": f"{a} {b}", "passage": f"why {a} {b}"} for a in words for b in words]
    data = tiny.rows_to(tmp_path / "rows.jsonl", *rows)
    values: dict[str, Any] = {"task": "text-embedding", "pooling": pooling, "validation_fraction": 0.25}
    run = tiny.run_of(
        make(tmp_path / "model"), data, tmp_path / "run", "batch_size=16", "bake=true", "export=[peft]", **values
    )
    record = run.make_task().survey(None)
    assert record.facts["rows"] == "64, pairs (anchor from query, positive from passage)"
    assert record.facts["pooling"] == pooling
    result = train(run, silent=True)
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert result.figures["mrr"] > max(0.6, result.figures["base mrr"] + 0.1)


def test_scores_are_learnt(tmp_path: Path):
    pairs = [("cat", "dog", 0.9), ("cat", "far", 0.1), ("sat", "ran", 0.7), ("sat", "far", 0.3), ("yes", "no", 0.5)]
    rows = [{"sentence1": one, "sentence2": other, "score": score} for one, other, score in pairs]
    data = tiny.rows_to(tmp_path / "rows.jsonl", *rows)
    values: dict[str, Any] = {"task": "text-embedding", "validation": str(data)}
    result = train(tiny.run_of(bert(tmp_path / "model"), data, tmp_path / "run", "steps=60", **values), silent=True)
    assert result.figures["correlation"] > max(0.85, result.figures["base correlation"])
    assert result.loss < 0.05


def test_pooling_is_that_of_the_models_own_files(tmp_path: Path):
    folder = bert(tmp_path / "model")
    assert sentence_pooling(str(folder)) is None
    (folder / "1_Pooling").mkdir()
    told = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True, "word_embedding_dimension": 16}
    (folder / "1_Pooling/config.json").write_text(json.dumps(told))
    assert sentence_pooling(str(folder)) == "cls"
    data = tiny.rows_to(tmp_path / "rows.jsonl", {"anchor": "the", "positive": "cat"})
    values: dict[str, Any] = {"task": "text-embedding", "validation_fraction": 0}
    task: Any = tiny.run_of(folder, data, tmp_path / "run", **values).make_task()
    assert task.survey(None).facts["pooling"] == "cls"
    (folder / "1_Pooling/config.json").write_text(json.dumps({**told, "pooling_mode_max_tokens": True}))
    with pytest.raises(ConfigError, match=r"says cls_token, max_tokens; choose mean, cls or last"):
        sentence_pooling(str(folder))


def test_pooling_as_newer_releases_write_it_and_what_follows_it(tmp_path: Path):
    (tmp_path / "1_Pooling").mkdir()
    told: dict[str, Any] = {"embedding_dimension": 16, "pooling_mode": "lasttoken", "include_prompt": True}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(told))
    assert sentence_pooling(str(tmp_path)) == "last"
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert sentence_pooling(str(tmp_path)) == "last"
    modules.insert(2, {"type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=r"modules\.json has Dense, .*to train without them, choose options\.pooling"):
        sentence_pooling(str(tmp_path))
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({**told, "pooling_mode": ["cls", "mean"]}))
    with pytest.raises(ConfigError, match=r"says cls, mean; choose mean, cls or last"):
        sentence_pooling(str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"anchor": "the", "positive": "cat", "score": 3}], "a number from 0 to 1 as 'score', not 3"),
        ([{"anchor": "the", "positive": 1}], "row 1 must have a text as 'positive'"),
        ([{"anchor": "the"}], "none of what is read"),
        ([{"anchor": "the", "positive": " "}], "row 1 has nothing in its 'positive'"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path: Path, rows: list[Any], reason: str):
    data = tiny.rows_to(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError, match=reason):
        tiny.run_of(tmp_path, data, tmp_path / "run", task="text-embedding").make_task().survey(None)


def test_an_empty_cell_is_no_negative(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("anchor,positive,negative\nthe cat,cat,\nthe dog,dog,cat\n")
    found = [one for one, _ in read_source(tmp_path / "rows.csv", {}, RELATED)]
    assert [one.negative for one in found] == [None, "cat"]
