"""How long a run will take: nobody knows before it has begun, but for who has seen another like it."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path

from adapterkit.errors import AdapterKitError
from adapterkit.training import yaml_values
from adapterkit.training.config import FREE_ON_RESUME, read_values
from adapterkit.training.resuming import differences
from adapterkit.training.run import Run
from adapterkit.training.run_folder import read_metrics

_FREE = FREE_ON_RESUME - {"block_swap", "num_workers"} | {
    *("seed", "learning_rate", "scheduler", "warmup_steps", "weight_decay", "rates", "layer_decay"),
    *("adapter_name", "init_from"),
}
"""Keys that change no step's time."""
_LEAST, _MOST = 5, 200  # steps that tell anything; folders that are looked into


def foretold(run: Run) -> str | None:
    """What is to be expected, and from where that is known; None where no run of before was like this one.

    Looked at are the runs beside its folder, and that in it, of the same data, model, adapter and options.
    """
    now = yaml_values.parse(yaml_values.dump(run.resolved()))
    free = _FREE | {f"options.{name}" for name in run.task.free_options}
    for folder in _newest(Path(run.config.output)):
        found = _seconds(folder, now, free)
        if len(found) < _LEAST:
            continue
        each, count = statistics.median(found[1:]), run.config.steps  # the first one prepares what others have
        known = f"a step takes {each:.3g} s, as in {folder} ({len(found)} steps)"
        if run.config.epochs is not None:
            return f"not known before the data is read; {known}"
        minutes, seconds = divmod(round(each * count), 60)
        return f"about {minutes // 60}:{minutes % 60:02d}:{seconds:02d} without samples, if {known}"
    return None


def _newest(output: Path) -> list[Path]:
    """Run folders beside this one, the one in it too; what is another user's, or is gone by then, is passed over."""
    dated: list[tuple[float, Path]] = []
    with contextlib.suppress(OSError):
        for one in output.parent.iterdir():
            with contextlib.suppress(OSError):
                dated.append(((one / "metrics.jsonl").stat().st_mtime, one))
    return [folder for _, folder in sorted(dated, reverse=True)[:_MOST]]


def _seconds(folder: Path, now: dict[str, object], free: set[str] | frozenset[str]) -> list[float]:
    """Of each step of a run that is like this one; none of others."""
    try:
        before = read_values(folder / "config.yaml", (), [])
        records = read_metrics(folder / "metrics.jsonl")
    except (AdapterKitError, OSError):
        return []
    if any(not any(key == one or key.startswith(f"{one}.") for one in free) for key, *_ in differences(before, now)):
        return []
    return [one["seconds"] for one in records if "loss" in one and "seconds" in one]
