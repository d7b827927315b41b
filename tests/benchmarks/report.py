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

COLUMNS = ("", "median", "quartiles", "CPU median", "ratio of medians")
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


def as_markdown(content: Mapping[str, Any]) -> str:
    """What `as_json` gave, as one table per case."""
    lines = [", ".join(f"{key} {value}" for key, value in content["machine"].items()), ""]
    for case, rows in content["seconds"].items():
        lines += [f"### {case}", "", " ".join((CASES[case].__doc__ or "").split()), ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---|---:|---:|---:|---|"]
        lines += ["| " + " | ".join(_cells(name, rows)) + " |" for name in rows]
        lines.append("")
    return "\n".join(lines)


def _cells(name: str, rows: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    row = rows[name]
    quartiles = f"{_milliseconds(row['quartile_1'])} to {_milliseconds(row['quartile_3'])}"
    relations = [f"{row['median'] / rows[other]['median']:.2f} x {other}" for other in _compared(name, rows)]
    if name == "adapterkit" and {"floor", "peft"} <= rows.keys():
        ours, theirs = (rows[one]["median"] - rows["floor"]["median"] for one in (name, "peft"))
        relations.append(f"{ours / theirs:.2f} x what peft adds to the floor")
    return name, _milliseconds(row["median"]), quartiles, _milliseconds(row["cpu_median"]), ", ".join(relations)


def _compared(name: str, rows: Mapping[str, object]) -> list[str]:
    """The floor, and for a rival's row our own row of that name."""
    others = ["floor"] if name != "floor" else []
    others += [name.replace("peft", "adapterkit")] if name.startswith("peft") else []
    return [other for other in others if other in rows]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
