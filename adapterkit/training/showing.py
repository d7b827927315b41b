"""Figures and samples of the model as it is; training goes on as if they had not been made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from adapterkit.training.checked import CheckedTask
from adapterkit.training.events import Callbacks
from adapterkit.training.learner import Learner
from adapterkit.training.rank import Rank
from adapterkit.training.run_folder import RunFolder
from adapterkit.training.samples.previews import Previews, told
from adapterkit.training.snapshots import writing

Made = TypeVar("Made")


class Showing:
    """Makes them, in the processes that do; all wait until they are made.

    Args:
        rank: What this process does.
        task: What measures and draws.
        previews: The samples.
        learner: The adapter.
        accelerator: What computes.
        folder: Takes the figures.
        callbacks: Are told.
        tell: Takes a line for the user.

    Attributes:
        measured: The step of the last evaluation that was recorded, and its figures.
    """

    def __init__(
        self,
        rank: Rank,
        task: CheckedTask,
        previews: Previews,
        learner: Learner,
        accelerator: Accelerator,
        folder: RunFolder,
        callbacks: Callbacks,
        tell: Callable[[str], object],
    ) -> None:
        self._rank, self._task, self._previews, self._learner = rank, task, previews, learner
        self._accelerator, self._folder, self._callbacks, self._tell = accelerator, folder, callbacks, tell
        self.measured: tuple[int | None, Mapping[str, float]] = (None, {})

    def evaluate(self, step: int, *, record: bool = True) -> Mapping[str, float]:
        """Figures after so many steps; none where a signal came, or in a process that makes none."""
        figures: Mapping[str, float] = {}
        if self._rank.shows():
            figures = self.made(step, self._task.evaluate) or {}
        if record:
            self.measured = step, figures
            if figures and self._rank.main:
                self._folder.record({"step": step, **figures})
                self._callbacks.tell("evaluate", figures)
                measured = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
                self._tell(f"step {step}: {measured}")
        self._accelerator.wait_for_everyone()
        return figures

    def sample(self, step: int) -> None:
        """Samples after so many steps."""
        files: list[Path] = []
        if self._rank.shows():
            shown = self._learner.adapters if step else None
            files = [*(self.made(step, lambda: self._previews.draw(step, shown)) or ())]
            if files and self._rank.main:
                self._callbacks.tell("sample", files)
            for line in told(step, self._previews.samples, files):
                self._tell(line)
        self._accelerator.wait_for_everyone()

    def made(self, step: int, make: Callable[[], Made]) -> Made | None:
        """What is made of the model as samples and figures see it; None where a signal after a step ended it."""
        try:
            # A signal ends nothing before values are in use or while they are put back: half of them would stay.
            with self._learner.shown(), writing(self._folder.samples), self._rank.showing(step):
                return make() if self._rank.shows() else None
        except KeyboardInterrupt:
            if not self._rank.signalled or not step:
                raise
            return None
