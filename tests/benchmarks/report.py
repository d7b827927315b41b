"""The measurements as a table, as JSON, and as Markdown."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.cases import CASES
from tests.benchmarks.measure import Timing

Results = Mapping[str, Mapping[str, Timing]]

COLUMNS = ("", "median", "quartiles", "of the first", "CPU median")
LIBRARIES = ("torch", "transformers", "peft", "safetensors")


def machine() -> dict[str, Any]:
    """What the figures depend on. The load tells whether the machine was quiet."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def as_json(results: Results, described: Mapping[str, Any]) -> dict[str, Any]:
    cases = {case: {name: timing.summary() for name, timing in timings.items()} for case, timings in results.items()}
    return {"machine": dict(described), "seconds": cases}


def as_markdown(results: Results, described: Mapping[str, Any]) -> str:
    """One table per case; each row is also given as a multiple of the case's first row."""
    lines = [", ".join(f"{key} {value}" for key, value in described.items()), ""]
    for case, timings in results.items():
        lines += [f"### {case}", "", " ".join((CASES[case].__doc__ or "").split()), ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---|---:|---:|---:|---:|"]
        first = next(iter(timings.values())).median
        lines += ["| " + " | ".join(_row(name, timing, first)) + " |" for name, timing in timings.items()]
        lines.append("")
    return "\n".join(lines)


def _row(name: str, timing: Timing, first: float) -> tuple[str, ...]:
    quartiles = " to ".join(_milliseconds(value) for value in timing.quartiles)
    return (
        name,
        _milliseconds(timing.median),
        quartiles,
        f"{timing.median / first:.2f}",
        _milliseconds(timing.cpu_median),
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
