"""Adapters against full fine-tuning.

python -m examples.comparison                                # trains what is not in the results yet
python -m examples.comparison --job style --method LoRA      # some of it; options may be repeated
python -m examples.comparison --report                       # the tables and the plot of what is there
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from adapterkit.torchvision_ops import ensure_torchvision_ops
from examples.comparison.job import Job
from examples.comparison.methods import METHODS

HERE = Path(__file__).parent
JOBS = {"style": "Style", "classes": "Classes", "documentation": "Documentation", "sentences": "Sentences"}
"""Module and class: each brings libraries of its own, which take seconds."""


def job_named(name: str) -> type[Job]:
    """The class of a job."""
    return getattr(import_module(f"examples.comparison.{name}"), JOBS[name])


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.comparison", description="Adapters against full tuning.")
    parser.add_argument("--job", action="append", choices=[*JOBS], help="all by default")
    parser.add_argument("--method", action="append", choices=[*METHODS], help="all by default")
    parser.add_argument(
        "--seed", action="append", type=int, help="of the runs that are measured; 1, 2 and 3 by default"
    )
    parser.add_argument("--steps", type=int, help="of every run; the job's own by default. Needs other --results")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="gets the tables")
    parser.add_argument("--plot", type=Path, default=HERE / "comparison.png")
    parser.add_argument("--work", type=Path, default=Path("runs/comparison"), help="for data and bases")
    parser.add_argument("--report", action="store_true", help="train nothing; write the tables and the plot")
    chosen = parser.parse_args()
    if chosen.steps and chosen.results == HERE / "results.jsonl":
        parser.error("--steps makes other results; name a file for them with --results")
    return chosen


def main() -> None:
    """Trains, or reports."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ensure_torchvision_ops()
    from examples.comparison import report, runs  # only after the line above

    chosen = arguments()
    results = runs.Results(chosen.results)
    if chosen.report:
        jobs = [job_named(name) for name in JOBS]
        report.write(chosen.readme, jobs, results)
        report.plot(chosen.plot, jobs, results)
        return
    for name in chosen.job or JOBS:
        job = job_named(name)(chosen.work, chosen.steps)
        for method in job.methods:
            if chosen.method is None or method in chosen.method:
                runs.compare(job, method, results, chosen.seed or runs.SEEDS, tell)


def tell(record: Mapping[str, Any]) -> None:
    """A line for a run."""
    print(", ".join(f"{name} {value}" for name, value in record.items() if name != "machine"), flush=True)


if __name__ == "__main__":
    main()
