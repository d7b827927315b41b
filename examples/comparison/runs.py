"""Trials: which there are, what one comes to, and the file that they are kept in."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adapterkit.plugins import get_plugin_manager
from adapterkit.training.loop import train
from adapterkit.training.run import load_run
from examples.comparison import meter
from examples.comparison.job import Job
from examples.comparison.methods import HEAD, METHODS, first_rates, next_rate

SEARCH_SEED, SEEDS = 0, (1, 2, 3)
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """One run: it trains with a seed and a rate, and measures with the validation or the test part."""

    job: str
    method: str
    rate: float
    seed: int
    split: str


class Results:
    """Records of trials in a file of JSON lines, each written when it is there.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.records: list[Record] = [json.loads(line) for line in lines]

    def of(self, trial: Trial) -> Record | None:
        """What is known of a trial."""
        wanted = asdict(trial).items()
        return next((one for one in self.records if wanted <= one.items()), None)

    def add(self, record: Record) -> None:
        """Keeps one more."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)


def perform(job: Job, trial: Trial) -> Record:
    """Trains and measures."""
    job.ready()
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = train(load_run(None, **run_of(job, trial, Path(folder) / "run")), silent=True)
        if result.exit_code:
            raise KeyboardInterrupt
        seconds = time.process_time() - start
        cost = json.loads((result.folder / meter.FILE).read_text(encoding="utf-8"))
        figures = {name: round(value, 5) for name, value in job.measure(result, trial.split).items()}
    cost |= {"step": round(cost["step"], 4), "run": round(seconds, 2), "steps": result.step}
    return {**asdict(trial), **figures, **cost, "machine": machine()}


def run_of(job: Job, trial: Trial, output: Path) -> dict[str, Any]:
    """The keys of the run; all but `adapter` and `learning_rate` are the same for all methods of a job."""
    if not get_plugin_manager().has_plugin(meter.__name__):
        get_plugin_manager().register(meter)
    own_rate = [] if job.head_rate is None or trial.method == HEAD else [job.head_rate]
    return {
        **job.values(trial.split),
        "adapter": dict(METHODS[trial.method].adapter(job.places)),
        "learning_rate": trial.rate,
        "rates": [{"select": "head", "learning_rate": rate} for rate in own_rate],
        "seed": trial.seed,
        "steps": job.steps,
        "scheduler": "cosine",
        "warmup_steps": job.steps // 10,
        "output": str(output),
        "checkpoint_every": None,
        "samples": False,
        "export": [],
        "callbacks": ["meter"],
    }


def machine() -> str:
    """What figures of time depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    threads = torch.get_num_threads()
    return (
        f"{model}, {threads} thread{'s' * (threads > 1)}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def searched(job: Job, method: str, results: Results) -> dict[float, Record]:
    """Rate -> what the search has found so far."""
    found = (one for one in results.records if one["job"] == job.name and one["method"] == method)
    return {one["rate"]: one for one in found if one["split"] == "validation" and one["seed"] == SEARCH_SEED}


def best_rate(job: Job, found: Mapping[float, Record]) -> float:
    """That of the best figure."""
    losses = _losses(job, found)
    return min(losses, key=lambda rate: losses[rate])


def _losses(job: Job, found: Mapping[float, Record]) -> dict[float, float]:
    sign = -1 if job.larger_is_better else 1
    return {rate: sign * record[job.figure] for rate, record in found.items()}


def compare(job: Job, method: str, results: Results, seeds: Sequence[int], tell: Callable[[Record], object]) -> None:
    """Searches the rate on the validation part, then measures with the test part; what is there is not done again."""

    def do(trial: Trial) -> None:
        if results.of(trial) is None:
            record = perform(job, trial)
            results.add(record)
            tell(record)

    for rate in _rates(job, method, results):
        do(Trial(job.name, method, rate, SEARCH_SEED, "validation"))
    rate = best_rate(job, searched(job, method, results))
    for seed in seeds:
        do(Trial(job.name, method, rate, seed, "test"))


def _rates(job: Job, method: str, results: Results) -> Iterator[float]:
    """Those of the search: the first three, then one further as long as the best lies at an end."""
    yield from first_rates(method, job.scale)
    while (rate := next_rate(_losses(job, searched(job, method, results)))) is not None:
        yield rate
