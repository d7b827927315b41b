from __future__ import annotations

from pathlib import Path

import pytest

from adapterkit.errors import ConfigError
from adapterkit.training.loop import train
from adapterkit.training.order import Order
from adapterkit.training.portions import Portions
from adapterkit.training.processes import ignored_of_launcher
from adapterkit.training.run_folder import read_metrics
from tests.training.toy_task import toy_run

GROUPS = [0] * 5 + [1] * 9 + [2] * 3


def portions(size: int, passes: int, processes: int, before: Portions | None = None) -> Portions:
    config = toy_run(Path("run"), batch_size=size, gradient_accumulation=passes).config
    return Portions.of(config, processes, before.record() if before else None)


@pytest.mark.parametrize(("processes", "size", "passes"), [(1, 4, 4), (2, 4, 2), (4, 4, 1), (8, 2, 1), (16, 1, 1)])
def test_a_step_keeps_its_examples_in_batches_that_are_not_larger(processes: int, size: int, passes: int):
    before = portions(4, 1, 4)
    now = portions(4, 1, processes, before)
    assert (now.batch_size, now.passes, now.together, now.examples) == (size, passes, 16, 16)
    assert bool(now.notes(toy_run(Path("run"), batch_size=4).config)) == ((size, passes) != (4, 1))


def test_processes_that_cannot_share_a_step_are_refused():
    with pytest.raises(ConfigError, match=r"has 6 examples, which 4 processes cannot .* go on with one of 1, 2, 3, 6"):
        portions(3, 1, 4, portions(3, 1, 2))


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_steps_have_the_same_examples_however_they_are_divided(processes: int, groups: list[int] | None):
    def steps(divided: Portions) -> list[set[tuple[int, int]]]:
        ranks = [
            list(
                Order(
                    17,
                    divided.batch_size,
                    5,
                    0,
                    40 * divided.passes,
                    rank,
                    divided.processes,
                    groups=groups,
                    together=divided.together,
                )
            )
            for rank in range(divided.processes)
        ]
        return [
            {
                (draw.index, draw.seed)
                for own in ranks
                for batch in own[n * divided.passes :][: divided.passes]
                for draw in batch
            }
            for n in range(40)
        ]

    before = portions(3, 1, 2)
    assert steps(portions(3, 1, processes, before)) == steps(before)


def test_what_the_launcher_says_otherwise_is_told(monkeypatch: pytest.MonkeyPatch):
    config = toy_run(Path("run"), "shard=true").config
    assert list(ignored_of_launcher(config, 2)) == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert list(ignored_of_launcher(config, 1)) == [
        "mixed_precision is no, as in the run; the launcher says bf16",
        "gradient_accumulation is 1, as in the run; the launcher says 4",
        "torch_compile is off, as in the run; the launcher says inductor",
        "there is one process, which has all of the base: nothing is spread",
    ]


@pytest.mark.parametrize(
    "variable", ["ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_DEEPSPEED"]
)
def test_launchers_whose_ways_are_others_are_refused(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match="accelerate launch"):
        train(toy_run(tmp_path / "run"), silent=True)
    assert not (tmp_path / "run").exists()


def test_a_launcher_does_not_divide_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(toy_run(tmp_path / "plain", steps=1), silent=True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(toy_run(tmp_path / "told", steps=1), silent=True)
    norms = [read_metrics(tmp_path / name / "metrics.jsonl")[1]["grad_norm"] for name in ("plain", "told")]
    assert norms[0] == norms[1]
