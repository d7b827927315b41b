"""`make bench`: every case, with parity asserted first. No bar is asserted: a busy machine would break it at random."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("peft")

from tests.benchmarks.__main__ import main
from tests.benchmarks.cases import CASES
from tests.benchmarks.measure import Side, measure


def test_sides_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    sides = {name: Side(lambda _, name=name: calls.append(name)) for name in "ab"}
    timings = measure(sides, rounds=3, warmup=1)
    assert "".join(calls) == "baabbaab"
    assert [len(timing.wall) for timing in timings.values()] == [3, 3]


def test_only_run_is_timed() -> None:
    import time

    slow = Side(lambda seconds: None, prepare=lambda: time.sleep(0.05), after=lambda _: time.sleep(0.05))
    assert min(measure({"slow": slow}, rounds=2, warmup=0)["slow"].wall) < 0.05


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
def test_benchmarks(tmp_path: Path) -> None:
    main(["--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["seconds"]) == set(CASES)
    assert all(row["median"] > 0 for rows in results["seconds"].values() for row in rows.values())
