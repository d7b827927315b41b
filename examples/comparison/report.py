"""The table and the plot of the results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.comparison.job import Job
from examples.comparison.methods import HEAD, METHODS
from examples.comparison.runs import Record, Results, best_rate, searched

BEGIN, END = "<!-- results: written by python -m examples.comparison -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Row:
    """What the seeds of a method came to.

    Attributes:
        method: Its name.
        rate: The chosen learning rate.
        at_end: Whether the best rate is the lowest or highest of those tried.
        values: The figure of each seed.
        others: Means of what else was measured, by name.
        trained: Numbers that train.
        memory: Bytes that training adds.
        step: CPU seconds a step.
        run: CPU seconds of a run.
    """

    method: str
    rate: float
    at_end: bool
    values: Sequence[float]
    others: Mapping[str, float]
    trained: int
    memory: int
    step: float
    run: float

    @property
    def mean(self) -> float:
        """Of the figure."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation of the figure over seeds (n - 1); 0 of one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


_KNOWN = frozenset(
    ("job", "method", "rate", "seed", "split", "trained", "memory", "activations", "step", "run", "steps", "machine")
)


def rows_of(job: type[Job], results: Results) -> list[Row]:
    """A row for each method that has been measured with the test part."""
    return [row for method in METHODS if (row := _row(job, method, results)) is not None]


def _row(job: Any, method: str, results: Results) -> Row | None:
    found = searched(job, method, results)
    if not found:
        return None
    rate = best_rate(job, found)
    wanted = {"job": job.name, "method": method, "rate": rate, "split": "test"}.items()
    records = [one for one in results.records if wanted <= one.items()]
    if not records:
        return None
    extra = [name for name in records[0] if name not in _KNOWN and name != job.figure and not name.startswith("base")]
    return Row(
        method=method,
        rate=rate,
        at_end=rate in (min(found), max(found)),
        values=[one[job.figure] for one in records],
        others={name: statistics.fmean(one[name] for one in records) for name in extra},
        trained=records[0]["trained"],
        memory=max(one["memory"] for one in records),
        step=statistics.median(one["step"] for one in records),
        run=statistics.median(one["run"] for one in records),
    )


def base_of(job: type[Job], results: Results) -> Record | None:
    """A record that tells of the base alone; None where a new head makes that meaningless."""
    if job.new_head:
        return None
    return next((one for one in results.records if one["job"] == job.name and one["split"] == "test"), None)


def table(job: type[Job], results: Results) -> Iterator[str]:
    """Lines of Markdown."""
    rows, base = rows_of(job, results), base_of(job, results)
    others = [*rows[0].others] if rows else []
    head = ["method", job.figure, "from – to", *others, "trained", "memory, MiB", "ms a step", "s a run", "rate"]
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" + "---:|" * (len(head) - 1)
    if base is not None:
        cells = [_told(job, base["base"]), "", *(_told(job, base[f"base {name}"], name) for name in others)]
        yield f"| base | {' | '.join([*cells, '0', '', '', '', ''])} |"
    for row in rows:
        cells = [
            row.method,
            f"{_told(job, row.mean)} ± {_told(job, row.spread, beside=row.mean)}",
            " – ".join(_told(job, end(row.values), beside=row.mean) for end in (min, max)),
            *(_told(job, value, name) for name, value in row.others.items()),
            f"{row.trained:,}",
            f"{row.memory / 2**20:.{1 if row.memory >= 2**20 else 2}f}",
            f"{1000 * row.step:.0f}",
            f"{row.run:.0f}",
            f"{row.rate:g}{'*' * row.at_end}",
        ]
        yield f"| {' | '.join(cells)} |"


def _told(job: type[Job], value: float, name: str = "", beside: float | None = None) -> str:
    """Shares as percentages; other numbers with as many digits as suit the number that they stand beside."""
    if (name or job.figure) in ("accuracy", "digits read"):
        return f"{value:.1%}"
    size = value if beside is None else beside
    return f"{value:.{1 if size >= 10 else 2 if size >= 0.2 else 4}f}"


def written(jobs: Sequence[type[Job]], results: Results) -> str:
    """All tables, between the marks that `write` looks for."""
    lines = [BEGIN, ""]
    for job in jobs:
        if rows := rows_of(job, results):
            seeds = min(len(row.values) for row in rows)
            better = "more" if job.larger_is_better else "less"
            lines += [f"### {job.title[0].upper()}{job.title[1:]}", ""]
            told = f"{job.figure.capitalize()} ({better} is better) of {seeds} seed{'s' * (seeds > 1)}."
            lines += [told, "", *table(job, results), ""]
    machines = sorted({one["machine"] for one in results.records})
    return "\n".join([*lines, *(f"Measured on: {one}." for one in machines), "", END])


def write(readme: Path, jobs: Sequence[type[Job]], results: Results) -> None:
    """Puts the tables into a file in the place of those that it has."""
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + written(jobs, results) + after, encoding="utf-8")


def plot(path: Path, jobs: Sequence[type[Job]], results: Results) -> None:
    """The figure against the numbers that train; bars are the standard deviation over seeds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    colours = mpl.color_sequences["tab10"]
    for axis, job in zip(axes, (one for one in jobs if rows_of(one, results)), strict=False):
        for number, method in enumerate(METHODS):
            for row in (one for one in rows_of(job, results) if one.method == method):
                style = {"fmt": "s" if method == HEAD else "o", "color": colours[number], "capsize": 4}
                axis.errorbar(row.trained, row.mean, row.spread, label=method, **style)
        if (base := base_of(job, results)) is not None:
            axis.axhline(base["base"], color="grey", linestyle="--", label="base")
        axis.set(xscale="log", xlabel="numbers that train", ylabel=job.figure, title=job.title)
        axis.title.set_fontsize(9)
        if not job.larger_is_better:
            axis.set_yscale("log")
            axis.invert_yaxis()
        axis.legend(fontsize=7)
    figure.suptitle("up is better", fontsize=9)
    figure.savefig(path, dpi=80)
