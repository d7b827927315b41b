"""`metrics.png`: the loss, the learning rate and the figures of a run, drawn from its metrics."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adapterkit.training.events import Callback, Training
from adapterkit.training.progress import RECENT
from adapterkit.training.result import Result
from adapterkit.training.run_folder import read_metrics


class Plots(Callback):
    """Draws them when a session ends."""

    def end(self, training: Training, result: Result) -> None:
        path = training.folder / "metrics.jsonl"
        if path.exists():
            plot(read_metrics(path), training.folder / "metrics.png")


_OF_STEPS = frozenset({"step", "loss", "lr", "grad_norm", "seconds"})


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws a panel for each thing that was measured, over the steps; nothing where no step was made.

    Args:
        records: Of the metrics, in order.
        path: The picture.
    """
    steps = [record for record in records if "loss" in record and "lr" in record]
    if not steps:
        return False
    figures = figures_in(records)
    panels = [("loss", _column(steps, "loss")), ("learning rate", _column(steps, "lr")), *figures.items()]
    figure = Figure(figsize=(6.4, 2.0 * len(panels)), dpi=100)
    figure.subplots_adjust(left=0.16, right=0.97, top=1 - 0.05 / len(panels), bottom=0.25 / len(panels), hspace=0.25)
    FigureCanvasAgg(figure)  # no display, and no state of matplotlib's own
    for number, (name, (x, y)) in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels), 1, number)
        axes.plot(x, y, lw=0.6 if name == "loss" else 1.2, marker="o" if name in figures else "", ms=3, alpha=0.8)
        if name == "loss":
            axes.plot(x, running_mean(y, RECENT), lw=1.6, label=f"mean of {RECENT} steps")
            axes.legend(frameon=False, fontsize=8)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("step")
    temporary = path.with_suffix(f".{os.getpid()}.png")
    figure.savefig(temporary)
    temporary.replace(path)
    return True


def figures_in(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Name of what a task measured -> the steps, and its values there."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        if "lr" in record:
            continue  # of a step
        for name, value in record.items():
            if name not in _OF_STEPS - {"loss"}:
                steps, values = found.setdefault(name if name != "loss" else "held-out loss", ([], []))
                steps.append(record["step"])
                values.append(value)
    return found


def running_mean(values: Sequence[float], count: int) -> list[float]:
    """The mean of the last `count` values at each place, of fewer at the start."""
    found, total = [], 0.0
    for place, value in enumerate(values):
        total += value
        if place >= count:
            total -= values[place - count]
        found.append(total / min(place + 1, count))
    return found


def _column(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [record["step"] for record in records], [record[name] for record in records]
