"""Figures and samples of the model as it is; training goes on as if they had not been made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from accelerate import Accelerator

from adapterkit.training.checked import CheckedTask
from adapterkit.training.events import Callbacks
from adapterkit.training.learner import Learner
from adapterkit.training.rank import Rank
from adapterkit.training.run_folder import RunFolder
from adapterkit.training.samples.previews import Previews, told
from adapterkit.training.snapshots import writing


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
            with self.shown(step):
                figures = self._task.evaluate()
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
            with self.shown(step):
                files = self._previews.draw(step, self._learner.adapters if step else None)
            if files and self._rank.main:
                self._callbacks.tell("sample", files)
            for line in told(step, self._previews.samples, files):
                self._tell(line)
        self._accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def shown(self, step: int) -> Iterator[None]:
        """The model as samples and figures are made with it. A signal after the first step ends the block alone."""
        try:
            with self._rank.showing(step), self._learner.shown(), writing(self._folder.samples):
                yield
        except KeyboardInterrupt:
            if not self._rank.signalled or not step:
                raise
