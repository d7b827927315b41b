"""The best of the evaluations: its adapter is kept beside the checkpoints, and is what the run ends with."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Set
from pathlib import Path
from typing import Any

from adapterkit.errors import ConfigError, did_you_mean
from adapterkit.training.config import Best
from adapterkit.training.run_folder import write_text

_RECORD = "best.json"


def check_best(best: Best | None, figures: Collection[str] | None) -> None:
    """Refuses a figure that the task does not measure.

    Args:
        best: What the run says, if anything.
        figures: What the task measures; None where that is not known yet.

    Raises:
        ConfigError: It measures others, or none.
    """
    if best is None or figures is None or best.figure in figures:
        return
    near = did_you_mean(best.figure, figures) or " It measures none: hold data out for that."
    raise ConfigError([f"best: the task measures no {best.figure!r}.{near}"], "run")


class Keeper:
    """Keeps the best so far.

    Args:
        best: Which figure, and which way.
        folder: Where it is kept.
        larger: Figures of the task of which more is better.
    """

    def __init__(self, best: Best, folder: Path, larger: Set[str]) -> None:
        self._figure, self.folder = best.figure, folder
        self._sign = 1.0 if (best.mode or ("max" if best.figure in larger else "min")) == "max" else -1.0
        self._record: dict[str, Any] | None = None
        self._worse: list[int] = []

    def recall(self, step: int) -> None:
        """Reads what an earlier session has kept, up to a step."""
        try:
            record = json.loads((self.folder / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(record, dict) and record.get("figure") == self._figure and record.get("step", step + 1) <= step:
            self._record = record
            self._worse = [one for one in record.pop("worse", ()) if one <= step]  # the later ones are made again

    def take(self, step: int, figures: Mapping[str, float], save: Callable[[Path], object]) -> None:
        """Keeps the adapter at a step where its figures are the best so far.

        Args:
            step: Which.
            figures: Measured there.
            save: Writes the adapter into a folder.
        """
        value = figures[self._figure]
        better = self._record is None or self._sign * value > self._sign * self._record["value"]
        better = better and not math.isnan(value)
        self._worse = [] if better else [*self._worse, step]
        self.folder.mkdir(parents=True, exist_ok=True)
        if better:
            save(self.folder)
            self._record = {"step": step, "figure": self._figure, "value": value}
        write_text(self.folder / _RECORD, json.dumps({**(self._record or {}), "worse": self._worse}))

    def enough(self, limit: int | None) -> str:
        """Why to end, where that many evaluations were not better than the best one; else nothing."""
        count = len(self._worse)
        return f"the best of {count + bool(self._record)} evaluations is {self}" if limit and count >= limit else ""

    @property
    def step(self) -> int | None:
        """Of the best one; None where there is none."""
        return self._record["step"] if self._record else None

    def __str__(self) -> str:
        if self._record is None:
            return f"none, for {self._figure} was never a number"
        return f"step {self._record['step']}: {self._figure} {self._record['value']:.4g}"

    def forget(self) -> None:
        """Removes what is kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
