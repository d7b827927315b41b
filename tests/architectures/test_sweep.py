"""A row that does not come to its end is told of, by the time that it had a processor."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.architectures import rows, sweep


def _spins(line: str, name: str) -> rows.Row:
    rows.Row(line, name, offered={"weight attn.q": 1}, unproven=rows.UNFINISHED).write()
    while True:
        pass


def _waits(line: str, name: str) -> rows.Row:
    time.sleep(1.5)
    return rows.Row(line, name, model="Slow")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FOLDER", tmp_path)


def test_a_proof_that_takes_too_long_leaves_its_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "made", _spins)
    found = sweep.row("causal", "any", 1.0, again=True)
    assert found.unproven == "no proof within 1 s of a processor"
    assert found.offered == {"weight attn.q": 1}


def test_what_waits_for_others_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "made", _waits)
    assert sweep.row("causal", "any", 1.0, again=True).model == "Slow"
