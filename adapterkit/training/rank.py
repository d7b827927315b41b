"""What one process does of a run, and where it writes: the first does most; where the base is spread, all compute."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator

from adapterkit.training.data_record import DataRecord
from adapterkit.training.interrupt import BEFORE, SAMPLES, TOGETHER, Interrupt
from adapterkit.training.processes import any_process
from adapterkit.training.run import Run
from adapterkit.training.run_folder import RunFolder
from adapterkit.training.sharding import Sharding


class Rank:
    """One process of a run.

    Args:
        run: The run.
        folder: Its folder.
        accelerator: What computes.
        interrupt: What signals do.

    Attributes:
        main: Whether it is the one that speaks and writes.
        sharding: How the base is spread; None where each process has all of it.
        place: Where it writes: the run folder, or one that is removed when the run ends.
    """

    def __init__(self, run: Run, folder: RunFolder, accelerator: Accelerator, interrupt: Interrupt) -> None:
        self._folder, self._accelerator, self._interrupt = folder, accelerator, interrupt
        self.main = accelerator.is_main_process
        self.sharding = Sharding.of(run.config, accelerator)
        self.place = folder.path

    @property
    def computes(self) -> bool:
        """Whether it makes figures and samples: where the base is spread, none can without the others."""
        return self.main or self.sharding is not None

    def any(self, asked: bool) -> bool:
        """Whether any process asks for it."""
        return any_process(self._accelerator, asked)

    @property
    def signalled(self) -> bool:
        """Whether a signal has come to this process."""
        return self._interrupt.signal is not None

    def shows(self) -> bool:
        """Whether it makes figures and samples now, which it does not after a signal."""
        came = self.signalled if self.sharding is None else self.any(self.signalled)
        return self.computes and not came

    def showing(self, step: int) -> contextlib.AbstractContextManager[None]:
        """What a signal does while figures and samples are made, after so many steps."""
        later = SAMPLES if self.sharding is None else TOGETHER
        return self._interrupt.during(later if step else BEFORE)

    @contextlib.contextmanager
    def opened(self, record: DataRecord, done: Callable[[], int], *, overwrite: bool, keep: bool) -> Iterator[None]:
        """The run folder is open in the first process; others have a place of their own, if they make anything.

        Args:
            record: What the data is.
            done: Says how many steps are made.
            overwrite: Replace the run that the folder holds.
            keep: Leave what is in it as it is.
        """
        self._accelerator.wait_for_everyone()  # all have seen the folder as it was
        if not self.main:
            with tempfile.TemporaryDirectory(prefix="adapterkit-") as place:
                self.place = Path(place)
                (self.place / self._folder.samples.name).mkdir()
                yield
        elif keep:
            self._folder.hold()
            yield
        else:
            with self._folder.opened(record, done(), lambda: done() > 0, overwrite=overwrite):
                yield
