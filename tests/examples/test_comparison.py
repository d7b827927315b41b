"""The comparison: which rates are tried, what a run costs, what the table says; and a job from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.plugins import get_plugin_manager
from examples.comparison import report
from examples.comparison.job import Job
from examples.comparison.meter import FILE, Meter
from examples.comparison.methods import HEAD, METHODS, RATES, first_rates, next_rate
from examples.comparison.runs import Results, Trial, best_rate, run_of, searched

ROOT = Path(__file__).parents[2]


class Toy(Job):
    name, title, figure, larger_is_better, usual_steps = "toy", "a toy", "perplexity", False, 1

    def make(self) -> None: ...

    def values(self, split: str) -> Mapping[str, Any]:
        return {}

    def measure(self, result: Any, split: str) -> Mapping[str, float]:
        return {}


def record(method: str, rate: float, seed: int, split: str, value: float, **others: float) -> dict[str, Any]:
    cost = {"trained": 1000, "memory": 3 << 20, "activations": 1, "step": 0.02, "run": 4.0, "steps": 1}
    trial = {"job": "toy", "method": method, "rate": rate, "seed": seed, "split": split}
    return {**trial, "perplexity": value, "base": 50.0, **cost, "machine": "a machine", **others}


def test_a_head_may_have_a_rate_of_its_own_beside_a_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(Toy, "head_rate", 3e-2)
    trials = [Trial("toy", method, 1e-3, 0, "test") for method in ("LoRA", HEAD)]
    body, head = (run_of(Toy(tmp_path), trial, tmp_path / "run") for trial in trials)
    get_plugin_manager().unregister(name=Meter.__module__)  # other tests list what is registered
    assert body["rates"] == [{"select": "head", "learning_rate": 3e-2}]
    assert (head["rates"], head["learning_rate"]) == ([], 1e-3)
    assert body["adapter"] == {"type": "lora", "rank": 8, "targets": "linear"}


def test_rates_are_searched_for_as_long_as_the_best_is_the_last():
    assert first_rates("LoRA", 1.0) == [3e-3, 1e-2, 3e-2]
    assert first_rates("full", 0.3) == [1e-4, 3e-4, 1e-3]
    assert next_rate({3e-3: 2.0, 1e-2: 1.0, 3e-2: 2.0}) is None
    assert next_rate({3e-3: 2.0, 1e-2: 1.5, 3e-2: 1.0}) == 1e-1
    assert next_rate({3e-3: 1.0, 1e-2: 1.5, 3e-2: 2.0}) == 1e-3
    assert next_rate({3e-3: 5.0, 1e-2: 4.0, 3e-2: 3.0, 1e-1: 2.0, 3e-1: 1.0}) is None
    assert next_rate({RATES[0]: 1.0, RATES[1]: 2.0, RATES[2]: 3.0}) is None


def test_every_method_has_its_middle_among_the_rates_and_a_type_that_is_there():
    for name, method in METHODS.items():
        assert [len(first_rates(name, scale)) for scale in (0.3, 1.0)] == [3, 3]
        values = dict(method.adapter(Toy.places))
        assert values.pop("type") in {"trainable", "lora", "dora", "bottleneck", "prefix", "reft"}


def test_the_table_has_mean_and_spread_at_the_rate_that_validation_chose(tmp_path: Path):
    results = Results(tmp_path / "results.jsonl")
    for rate, value in ((3e-3, 30.0), (1e-2, 20.0), (3e-2, 25.0)):
        results.add(record("LoRA", rate, 0, "validation", value))
    for seed, value in ((1, 21.0), (2, 22.0), (3, 23.0)):
        results.add(record("LoRA", 1e-2, seed, "test", value))
    results.add(record("LoRA", 3e-2, 1, "test", 1.0))  # another rate, which was not chosen
    results.add(record("full", 1e-3, 0, "validation", 10.0))  # nothing measured yet
    again = Results(tmp_path / "results.jsonl")
    assert again.records == results.records
    assert again.of(Trial("toy", "LoRA", 1e-2, 2, "test")) == results.records[4]
    assert again.of(Trial("toy", "LoRA", 1e-2, 4, "test")) is None
    assert best_rate(Toy(tmp_path), searched(Toy(tmp_path), "LoRA", again)) == 1e-2
    [row] = report.rows_of(Toy, again)
    assert (row.mean, row.spread, row.at_end) == (22.0, 1.0, False)
    text = report.written([Toy], again)
    assert "| base | 50.0 |" in text
    assert "| LoRA | 22.0 ± 1.0 | 21.0 – 23.0 | 1,000 | 3.0 | 20 | 4 | 0.01 |" in text
    assert "Perplexity (less is better) of 3 seeds." in text
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(readme, [Toy], again)
    assert readme.read_text() == f"before\n{text}\nafter\n"
    report.plot(tmp_path / "plot.png", [Toy], again)
    assert 5_000 < (tmp_path / "plot.png").stat().st_size < 200_000


def test_the_meter_counts_what_a_step_keeps(tmp_path: Path):
    """Input and rectified output of the layer that trains; neither weights nor what nothing needs."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    training: Any = SimpleNamespace(
        model=model, folder=tmp_path, run=SimpleNamespace(config=SimpleNamespace(adapter_name="adapter"))
    )
    meter = Meter()
    meter.begin(training)
    ak.Adapters(model).add("adapter", ak.Trainable("path:0"))
    model(torch.randn(6, 4)).sum().backward()
    meter.step(training, {})
    model(torch.randn(60, 4)).sum().backward()
    meter.step(training, {})
    meter.end(training, SimpleNamespace())  # type: ignore[arg-type]
    cost = json.loads((tmp_path / FILE).read_text())
    assert cost["activations"] == 4 * 6 * (4 + 8)
    assert cost["trained"] == 4 * 8 + 8
    assert cost["memory"] == cost["activations"] + 16 * cost["trained"]


def command(folder: Path, *arguments: str) -> str:
    own = ["--results", "results.jsonl", "--readme", "README.md", "--plot", "plot.png", "--work", "work"]
    done = subprocess.run(
        [sys.executable, "-m", "examples.comparison", *own, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_from_end_to_end(tmp_path: Path):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    some = ["--job", "classes", "--method", "full", "--seed", "5", "--steps", "3"]
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    command(tmp_path, *some)
    records = Results(tmp_path / "results.jsonl").records
    assert {(one["method"], one["split"]) for one in records} == {("full", "validation"), ("full", "test")}
    assert [one["seed"] for one in records][-1] == 5
    assert all(0 < one["accuracy"] <= 1 and one["trained"] == 201_477 and one["step"] > 0 for one in records)
    assert "accuracy" not in command(tmp_path, *some)  # nothing is done twice
    assert Results(tmp_path / "results.jsonl").records == records
    command(tmp_path, "--report")
    assert "| full |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "plot.png").exists()


@pytest.mark.slow
def test_the_page_has_the_results_that_are_kept():
    for library in ("timm", "diffusers", "sklearn"):
        pytest.importorskip(library)
    from examples.comparison.__main__ import HERE, JOBS, job_named

    text = report.written([job_named(name) for name in JOBS], Results(HERE / "results.jsonl"))
    assert text in (HERE / "README.md").read_text(encoding="utf-8"), "run: python -m examples.comparison --report"
