"""The time of a run is told where one like it was made, and from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterkit.training.loop import train
from adapterkit.training.plan import plan_of
from adapterkit.training.timing import foretold
from tests.training.toy_task import toy_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the run `first`, of eight steps that took what is written there."""
    train(toy_run(tmp_path / "first"), silent=True)
    file = tmp_path / "first/metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    seconds = iter([9.0, 2.0, 2.0, 2.5, 2.0, 2.0, 2.0, 50.0])
    timed = [{**one, "seconds": next(seconds)} if "seconds" in one else one for one in records]
    file.write_text("".join(f"{json.dumps(one)}\n" for one in timed))
    return tmp_path


def test_a_run_like_one_of_before_takes_as_long_a_step(folder: Path):
    free: dict[str, Any] = {"steps": 2000, "seed": 3, "learning_rate": 1e-5, "scheduler": "constant"}
    expected = f"about 1:06:40 without samples, if a step takes 2 s, as in {folder / 'first'} (8 steps)"
    assert plan_of(toy_run(folder / "second", **free)).facts["time"] == expected
    found = foretold(toy_run(folder / "second", steps=None, epochs=3))
    assert found == f"not known before the data is read; a step takes 2 s, as in {folder / 'first'} (8 steps)"


@pytest.mark.parametrize(
    "other",
    [
        {"batch_size": 4},
        {"block_swap": 1},
        {"gradient_checkpointing": True},
        {"adapter": {"type": "lora", "rank": 3}},
        {"model": "another"},
        {"options": {"scale": 2.0}},
    ],
)
def test_of_another_run_nothing_is_known(folder: Path, other: dict[str, Any]):
    assert foretold(toy_run(folder / "second", **other)) is None


def test_nothing_is_known_of_few_steps_damaged_runs_and_where_there_are_none(folder: Path, tmp_path: Path):
    assert "time" not in plan_of(toy_run(tmp_path / "elsewhere/run")).facts
    file = folder / "first/metrics.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:4]))
    assert foretold(toy_run(folder / "second")) is None
    file.write_text(whole)
    assert foretold(toy_run(folder / "second")) is not None
    (folder / "first/config.yaml").write_text("a: [")
    assert foretold(toy_run(folder / "second")) is None


def test_what_lies_beside_may_be_another_users(folder: Path, monkeypatch: pytest.MonkeyPatch):
    stat = Path.stat

    def guarded(path: Path, **told: Any) -> Any:
        if path.parent.name == "theirs":
            raise PermissionError(13, "Permission denied")
        return stat(path, **told)

    (folder / "theirs").mkdir()
    (folder / "damaged/metrics.jsonl").mkdir(parents=True)
    monkeypatch.setattr(Path, "stat", guarded)
    told = foretold(toy_run(folder / "second"))
    assert told is not None
    assert told.endswith(f"as in {folder / 'first'} (8 steps)")
