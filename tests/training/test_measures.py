"""What tasks say that they will measure is what they measure, and which way it is better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import ConfigError
from adapterkit.training.checked import CheckedTask
from adapterkit.training.loop import train
from adapterkit.training.plan import plan_of
from tests.training.language import tiny
from tests.training.language.test_classification import bert

TEXTS = [{"text": "the cat sat", "label": "cat"}, {"text": "the dog ran", "label": "dog"}] * 4
CHATS = [{"prompt": "why", "completion": "no"}] * 4
PAIRS = [{"prompt": "why ", "chosen": "no", "rejected": "yes"}] * 4
ALIKE = [{"anchor": "the cat", "positive": "sat"}, {"anchor": "the dog", "positive": "ran"}] * 2
SCORED = [{"anchor": "the cat", "positive": "sat", "score": score} for score in (0.1, 0.9, 0.5, 0.2)]


@pytest.mark.parametrize(
    ("task", "make", "rows", "more"),
    [
        ("causal-lm", tiny.llama, CHATS, set()),
        ("preference", tiny.llama, PAIRS, {"accuracy", "margin"}),
        ("text-classification", bert, TEXTS, {"accuracy", "f1"}),
        ("text-embedding", bert, ALIKE, {"accuracy", "mrr"}),
        ("text-embedding", bert, SCORED, {"correlation"}),
    ],
)
def test_tasks_on_language(tmp_path: Path, task: str, make: Any, rows: list[dict[str, Any]], more: set[str]):
    model, data = make(tmp_path / "model"), tiny.rows_to(tmp_path / "rows.jsonl", *rows)
    values: dict[str, Any] = {"task": task, "validation_fraction": 0.5}
    run = tiny.run_of(model, data, tmp_path / "run", "steps=1", "samples=false", **values)
    found = CheckedTask(run)
    found.survey(None)
    names = found.measures()
    assert names is not None
    first = json.loads((train(run, silent=True).folder / "metrics.jsonl").read_text().splitlines()[0])
    assert set(names) == set(first) - {"step"}
    assert {name for name in names if name in found.larger_is_better} == more
    with pytest.raises(ConfigError, match="It measures none: hold data out for that"):
        plan_of(tiny.run_of(model, data, tmp_path / "run", "best=loss", **{**values, "validation_fraction": 0}))
