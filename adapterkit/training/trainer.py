"""One run in one process, from looking at the data to the last sample."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from adapterkit.errors import ConfigError
from adapterkit.points import Points
from adapterkit.training.best import Keeper, check_best
from adapterkit.training.block_swap import placed
from adapterkit.training.checked import CheckedTask
from adapterkit.training.data_record import DataRecord, resumed
from adapterkit.training.events import Callbacks, Training, made
from adapterkit.training.export.closing import Left, close
from adapterkit.training.export.files import check_formats
from adapterkit.training.export.record import metadata_of
from adapterkit.training.interrupt import SAVING, STEPS, Interrupt
from adapterkit.training.learner import Learner
from adapterkit.training.order import derive_seed
from adapterkit.training.parts import describe
from adapterkit.training.plan import all_points, foreseen, parts_of_adapter
from adapterkit.training.plots import Plots
from adapterkit.training.portions import Portions
from adapterkit.training.processes import peak_memory
from adapterkit.training.progress import RECENT, make_progress
from adapterkit.training.rank import Rank
from adapterkit.training.result import Result
from adapterkit.training.resuming import consequences, planned, with_steps
from adapterkit.training.run import Run
from adapterkit.training.run_folder import RunFolder
from adapterkit.training.samples.previews import Previews
from adapterkit.training.sharding import Sharding
from adapterkit.training.showing import Showing
from adapterkit.training.snapshots import Snapshot, writing
from adapterkit.training.steps import Steps, every
from adapterkit.training.task import Setting
from adapterkit.training.trackers import Trackers


class Trainer:
    """Is used once.

    Args:
        run: The run.
        folder: Its folder.
        accelerator: What computes.
        interrupt: What signals do.
        snapshot: The checkpoint to go on from.
        overwrite: Replace what the folder holds.
        silent: Print nothing.
    """

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        accelerator: Accelerator,
        interrupt: Interrupt,
        snapshot: Snapshot | None,
        *,
        overwrite: bool = False,
        silent: bool = False,
    ) -> None:
        before = snapshot.values.get("portions") if snapshot else None
        self.portions = Portions.of(run.config, accelerator.num_processes, before)
        self.notes = self.portions.notes(run.config)
        run = self.portions.applied(run)
        self.run, self.config, self.folder, self.accelerator = run, run.config, folder, accelerator
        self.interrupt, self.snapshot, self.overwrite = interrupt, snapshot, overwrite
        self.done, self.saved = (snapshot.step, snapshot.step) if snapshot else (0, None)
        self.rank = Rank(run, folder, accelerator, interrupt)
        self.main = self.rank.main
        self.task = CheckedTask(run)
        self.previews = Previews(self.task, folder.samples)
        self.progress = make_progress(self.config.log_every, silent=silent or not self.main)
        self.best = Keeper(self.config.best, folder.best, self.task.larger_is_better) if self.config.best else None
        self.adapter: Path | None = None
        self.left = Left()

    def train(self, notes: Sequence[str], *, accept_changed_data: bool, only_finish: bool) -> Result:
        """Everything.

        Args:
            notes: Lines for the user.
            accept_changed_data: Go on although the data is no longer what the run began with.
            only_finish: Make no step.
        """
        if self.config.epochs is None and not only_finish:
            self._check_steps()
        record = self._survey(accept_changed_data)
        check_best(self.config.best, self.task.measures())
        if (outline := self.task.outline()) is not None:
            foreseen(self.run, outline, self.task)  # what does not fit is told before weights are read
        self.model = self._load_model()
        parts = parts_of_adapter(self.run, self.model, self.task)
        chosen = all_points(parts)
        with self.swap, self.progress:
            told = (describe(self.model, chosen), *self.swap.notes, *(f"data: {note}" for note in record.notes))
            for note in (*notes, *self.notes, *told):
                self.progress.message(note)
            extra, metadata = self.task.extra_modules(), lambda: metadata_of(self.config, self.task)
            self.learner = Learner(self.run, self.model, parts, extra, self.accelerator, metadata)
            if self.rank.sharding is not None:
                self._spread(self.rank.sharding)
            with self.learner.bare():
                self._prepare(chosen)
            with self._opened(record, keep=only_finish), self._told():
                self._start()
                if not only_finish:
                    self._steps()
                if only_finish or self.done == self.config.steps:
                    self._finish(early=only_finish)
            return self.result()

    def result(self) -> Result:
        """What the run has come to so far."""
        losses = self.folder.recent_losses(20)
        return Result(
            folder=self.folder.path,
            adapter=self.adapter,
            step=self.done,
            loss=sum(losses) / len(losses) if losses else math.nan,
            figures=self.left.figures,
            failed=self.left.failed,
            exit_code=self.interrupt.exit_code,
            saved=self.saved,
            speed=self.progress.pace(self.done),
            peak_memory=peak_memory(self.accelerator),
        )

    # -- before the first step --------------------------------------------------------------------------------------

    def _check_steps(self) -> None:
        if self.done > self.config.steps:
            raise ConfigError([f"steps is {self.config.steps}, but {self.done} are done already"], "run")

    def _survey(self, accept_changed_data: bool) -> DataRecord:
        """What the data is; that of a resumed run is what it was."""
        if self.snapshot is None:
            return self.task.survey(None)
        before = self.folder.data_before()
        return resumed(before, self.task.survey(before), accept=accept_changed_data)

    def _load_model(self) -> Any:
        set_seed(derive_seed(self.config.seed, "model") % 2**32)
        model = self.task.load_model()
        device = self.accelerator.device if self.rank.sharding is None else None
        self.swap = placed(self.task, model, self.config.block_swap, device)
        if self.config.gradient_checkpointing:
            self.task.checkpoint_activations()
        return model

    def _spread(self, sharding: Sharding) -> None:
        """Brings a model that is too large for one process to the devices, with its adapter."""
        self.learner.attach(self.snapshot)
        self.progress.message(sharding.spread(self.learner.acted_in()))
        self.task.place(self.model, self.accelerator.device)

    def _prepare(self, chosen: Points) -> None:
        """The data, and how many steps follow from it."""
        tell = self.progress.message
        self.data = self.task.prepare(Setting(self.model, self.accelerator.device, chosen, tell))
        if len(self.data) == 0:
            raise ConfigError([f"data: {self.config.data} holds no example to train on"], "run")
        tell(f"{len(self.data)} examples from {self.config.data}")
        before = self.folder.run_before() if self.snapshot else None
        self._take(self._planned(self.run))
        self._check_steps()
        for note in consequences(self._planned(before), self.run, self.done) if before else ():
            tell(note)

    def _planned(self, run: Run) -> Run:
        return planned(run, len(self.data), self.portions.examples)

    def _take(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.task.take(run.config)

    @contextlib.contextmanager
    def _opened(self, record: DataRecord, *, keep: bool) -> Iterator[None]:
        with self.rank.opened(record, lambda: self.done, overwrite=self.overwrite, keep=keep):
            self.previews.folder = self.rank.place / self.folder.samples.name
            yield

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Callbacks are told of the beginning and of the end, whatever comes between."""
        history = self.folder.records() if self.main else []
        training = Training(self.run, self.folder.path, self.model, self.done, history, self.progress.message)
        own = [Plots(), *([Trackers(self.accelerator)] if self.config.trackers else [])]
        found = [*((callback, "adapterkit") for callback in own), *made(self.run)] if self.main else []
        self.callbacks = Callbacks(found, training)
        self.callbacks.tell("begin")
        try:
            yield
        finally:
            self.callbacks.tell("end", self.result())

    def _start(self) -> None:
        """Puts the adapter on, new or as it was."""
        self.steps = Steps(self.run, self.task, self.learner, self.accelerator, self.data, self.done, self.portions)
        told = (self.folder, self.callbacks, self.progress.message)
        self.showing = Showing(self.rank, self.task, self.previews, self.learner, self.accelerator, *told)
        if self.snapshot is not None:
            self.progress.message(f"resumed from {self.snapshot.folder}")
            self.learner.resume(self.snapshot)
            if self.best is not None:
                self.best.recall(self.done)
        else:
            with self.learner.bare():
                figures = self.showing.evaluate(self.done)
                check_best(self.config.best, figures if self.main else None)
                self.showing.sample(self.done)
            self.learner.begin(lambda: self.steps.observe(self.model), self.progress.message)
        if self.main:
            check_formats(self.config, self.task, self.model, self.learner.adapters, self.progress.message)
        self.learner.train_mode()
        self.progress.begin(self.config.steps, self.done, self.folder.recent_losses(RECENT))

    # -- the steps --------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        self.interrupt.stage = SAVING  # what follows the steps, until the adapter is written
        try:
            with self.interrupt.during(STEPS):
                while self.done < self.config.steps and self._go_on():
                    pass
        finally:
            self.steps.close()

    def _go_on(self) -> bool:
        """One step, and what is to be done after it; whether the next one is to be made."""
        self._step()
        if self._stopped():
            return False
        last = self.done == self.config.steps
        if every(self.config.checkpoint_every, self.done) and not last:
            self._save()
        samples = every(self.config.sample_every, self.done) and not last
        evaluate = samples if self.config.evaluate_every is None else every(self.config.evaluate_every, self.done)
        if evaluate and not last:
            self._judge(self.showing.evaluate(self.done))
        if self.rank.any(bool(self.callbacks.training.stopped)):
            self.progress.message(f"step {self.done}: ending here; {self.callbacks.training.stopped}")
            self._take(with_steps(self.run, self.done))
        elif samples:
            self.showing.sample(self.done)
        return not self._stopped()

    def _stopped(self) -> bool:
        """Whether a signal has come, in any process; a checkpoint is then saved."""
        stop = self.rank.any(self.interrupt.signal is not None)
        if stop:
            self._save()
        return stop

    def _step(self) -> None:
        record, unit = self.steps.make(self.done)
        self.done = self.callbacks.training.step = record["step"]
        if self.main:
            self.folder.record(record)
        self.callbacks.tell("step", record)
        self.progress.step(self.done, record["loss"], record["lr"], record[unit], unit)

    def _judge(self, figures: Mapping[str, float]) -> None:
        """Keeps the adapter where it is the best so far; asks for the end where that was long ago."""
        if self.best is None or not self.main or not figures:
            return
        with self.interrupt.during(SAVING), writing(self.folder.best):
            self.best.take(self.done, figures, self.learner.save)
        if reason := self.best.enough(self.config.early_stop):
            self.callbacks.training.stop(reason)

    # -- what is written --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.saved == self.done:
            return
        if self.main:
            with self.interrupt.during(SAVING):
                written = self.learner.snapshot(self.folder.snapshots, self.done, self.portions.record())
                self.callbacks.tell("save", written)
        self.saved = self.done
        self.accelerator.wait_for_everyone()

    def _finish(self, *, early: bool) -> None:
        """The adapter's file first, then figures, samples, and files for others."""
        if early:
            self._take(with_steps(self.run, self.done))
        with self.interrupt.during(SAVING):
            if self.config.checkpoint_every and not early:
                self._save()
            self._write()
        if self.showing.measured[0] != self.done:  # an early end may follow an evaluation
            self._judge(self.showing.evaluate(self.done))
        figures = self._end_with_best()
        self.showing.sample(self.done)
        if self.rank.shows():
            self.showing.made(self.done, lambda: self._leave(figures, early=early))

    def _leave(self, figures: Mapping[str, Any], *, early: bool) -> None:
        """The task's last figures, files for others, and the summary, by which a run counts as finished."""
        figures = {**figures, **self.task.finish(self.previews.folder)}
        if not self.main:
            return
        self.left = self._close({**self.folder.base_figures(), **figures})
        early = early or bool(self.callbacks.training.stopped)
        self.folder.write_summary({"step": self.done, "early": early, "figures": self.left.figures})

    def _close(self, figures: Mapping[str, Any]) -> Left:
        """Grids, files for others, the card: where the base is spread, no process can make them."""
        if self.rank.sharding is not None:
            told = f"left to one process with the whole base: adapterkit finish {self.folder.path}"
            baked = ", the baked model" if self.config.bake else ""
            self.progress.message(f"grids{baked} and files for other tools are {told}")
            return Left(figures)
        figures = {**figures, **self.previews.finish(self.done, self.learner.adapters)}
        parts = (self.task, self.model, self.learner.adapters, self.previews, self.folder)
        return close(*parts, figures, self.progress.message)

    def _end_with_best(self) -> Mapping[str, float]:
        """Figures of what the run ends with, which is written anew where that is an earlier step."""
        figures = self.showing.measured[1]
        better = self.best.step not in (None, self.done) if self.best is not None else False
        if not self.rank.any(self.main and bool(figures) and better):
            return figures
        with self.interrupt.during(SAVING):
            self.learner.adopt(self.folder.best if self.main else None)
            self._write()
        self.progress.message(f"ending with the best, {self.best}")
        return self.showing.evaluate(self.done, record=False)

    def _write(self) -> None:
        if self.rank.computes:
            with writing(self.folder.adapter):
                self.adapter = self.learner.save(self.rank.place)
