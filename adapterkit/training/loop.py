"""The training loop: any task, any adapter type, on accelerate.

Gradients of the adapter are averaged over the processes explicitly: they are small, and the model needs no wrapper, so
every part of a pipeline trains alike. Each step seeds every random generator from the run's seed and its own number;
so the state of a run is its step, its adapter and its optimizer, and a resumed run goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, set_seed
from torch import nn

from adapterkit.errors import ConfigError, StateError, TrainingError
from adapterkit.handle.listing import points
from adapterkit.points import Points
from adapterkit.training.checked import CheckedTask
from adapterkit.training.data_record import DataRecord, resumed
from adapterkit.training.export.closing import close
from adapterkit.training.export.record import metadata_of
from adapterkit.training.interrupt import BEFORE, SAMPLES, SAVING, STEPS, Interrupt
from adapterkit.training.learner import Learner
from adapterkit.training.order import Order, derive_seed, ordered
from adapterkit.training.parts import describe, inference, parts_of, to_device
from adapterkit.training.plan import foreseen
from adapterkit.training.processes import any_process, make_accelerator, mean_over_processes
from adapterkit.training.progress import RECENT, make_progress
from adapterkit.training.rates import factor
from adapterkit.training.result import Result
from adapterkit.training.resuming import consequences, read_run, with_steps
from adapterkit.training.run import Run
from adapterkit.training.run_folder import RunFolder
from adapterkit.training.samples.previews import Previews, told
from adapterkit.training.snapshots import Snapshot, writing
from adapterkit.training.task import Setting, groups_of

_LAST = 20
"""Steps whose mean loss a run comes to."""


def train(
    run: Run,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changed_data: bool = False,
    silent: bool = False,
) -> Result:
    """Trains an adapter as a run says, and leaves everything in its folder.

    A signal (Ctrl-C, SIGTERM, SIGHUP) ends it with a result that has an `exit_code`.

    Args:
        run: From `load_run`.
        resume: Go on from the newest checkpoint that is whole; from the start where there is none.
        overwrite: Replace a run that the folder holds.
        accept_changed_data: Resume although the data is no longer what the run began with.
        silent: Print no progress.

    Raises:
        StateError: The folder is in use and neither flag is given.
        DataError: The data cannot be used, or (DataChangedError) is not that of the run to be resumed.
        ConfigError: The run does not fit the model, the machine, or the run to be resumed.
        TrainingError: The loss is not finite.
    """
    folder = RunFolder(run)
    folder.check(resume=resume, overwrite=overwrite)
    snapshot = folder.snapshots.newest() if resume else None
    if snapshot is not None and (done := _finished(run, folder, snapshot.step)):
        return done
    notes = [f"there is no checkpoint in {folder.path} to resume: beginning at the first step"]
    return _run(
        run,
        folder,
        snapshot,
        overwrite=overwrite,
        accept_changed_data=accept_changed_data,
        silent=silent,
        notes=notes if resume and snapshot is None else (),
    )


def finish(folder: Path, *, step: int | None = None, accept_changed_data: bool = False, silent: bool = False) -> Result:
    """Ends a run where it is: writes the adapter of a checkpoint, figures and samples. It can still be resumed.

    Args:
        folder: The run folder.
        step: Of the checkpoint; the newest by default.
        accept_changed_data: As for `train`.
        silent: Print no progress.

    Raises:
        StateError: There is no run, or no such checkpoint.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise StateError(f"{folder} holds no run (no {path.name})")
    run = read_run(path).at(folder)
    place = RunFolder(run)
    steps = place.snapshots.steps()
    if not steps or (step is not None and step not in steps):
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none yet"
        raise StateError(f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}; {there}")
    snapshot = place.snapshots.newest() if step is None else place.snapshots.read(step)
    return _run(
        run, place, snapshot, overwrite=False, accept_changed_data=accept_changed_data, silent=silent, only_finish=True
    )


def _finished(run: Run, folder: RunFolder, step: int) -> Result | None:
    """What a run came to that has nothing left to do."""
    summary = folder.read_summary()
    wanted = run.config.steps if run.config.epochs is None else step
    before = folder.run_before()
    if before is None or summary is None or summary["step"] != step or wanted != step or summary.get("early"):
        return None
    if before.config.epochs != run.config.epochs or not folder.adapter.is_file():
        return None
    figures = summary.get("figures", {})
    return Result(folder.path, folder.adapter, step, _loss(folder), figures, saved=step, finished_before=True)


def _loss(folder: RunFolder) -> float:
    tail = folder.recent_losses(_LAST)
    return sum(tail) / len(tail) if tail else math.nan


def _run(
    run: Run,
    folder: RunFolder,
    snapshot: Snapshot | None,
    *,
    overwrite: bool,
    accept_changed_data: bool,
    silent: bool,
    only_finish: bool = False,
    notes: Sequence[str] = (),
) -> Result:
    try:
        accelerator = make_accelerator(run)
        with Interrupt(silent=silent or not accelerator.is_main_process) as interrupt:
            trainer = Trainer(run, folder, accelerator, interrupt, snapshot, notes, overwrite=overwrite, silent=silent)
            try:
                return trainer.train(accept_changed_data=accept_changed_data, only_finish=only_finish)
            except KeyboardInterrupt:
                if interrupt.signal is None:
                    raise
                return trainer.result()
    finally:
        folder.close()
        AcceleratorState._reset_state()  # accelerate keeps its settings for the process; the next run has its own


class Trainer:
    """One run in one process; see `train`."""

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        accelerator: Accelerator,
        interrupt: Interrupt,
        snapshot: Snapshot | None,
        notes: Sequence[str] = (),
        *,
        overwrite: bool = False,
        silent: bool = False,
    ) -> None:
        self.run, self.config, self.folder, self.accelerator = run, run.config, folder, accelerator
        self.interrupt, self.notes = interrupt, notes
        self.snapshot, self.done = snapshot, snapshot.step if snapshot else 0
        self.main = accelerator.is_main_process
        self.task = CheckedTask(run)
        self.previews = Previews(self.task, folder.samples)
        self.overwrite, self.silent = overwrite, silent or not self.main
        self.saved: int | None = self.done if snapshot else None
        self.adapter: Path | None = None

    def train(self, *, accept_changed_data: bool, only_finish: bool = False) -> Result:
        """Everything from looking at the data to the last sample."""
        if self.config.epochs is None and not only_finish:
            self._check_steps()
        record = self._survey(accept_changed_data)
        if (outline := self.task.outline()) is not None:
            foreseen(self.run, outline)  # what does not fit is told before weights are read
        self.model = self._load_model()
        chosen = points(self.model, adapter=self.run.adapter)
        with make_progress(self.config.log_every, silent=self.silent) as self.progress:
            for note in (*self.notes, describe(self.model, chosen), *(f"data: {note}" for note in record.notes)):
                self.progress.message(note)
            extra = self.task.extra_modules()
            self.learner = Learner(self.run, self.model, chosen, extra, self.accelerator, self._metadata)
            self._prepare(chosen)
            steps = self.done if only_finish else self.config.steps
            with self._folder(record, keep=only_finish):
                self._start({point.component for point in chosen})
                self.progress.begin(steps, self.done, self.folder.recent_losses(RECENT))
                if self.done < steps:
                    self._steps()
            return self.result() if self.done < steps else self._finish(early=only_finish)

    def result(self, figures: Mapping[str, Any] | None = None) -> Result:
        """What the run has come to so far."""
        path, loss, code = self.folder.path, _loss(self.folder), self.interrupt.exit_code
        return Result(path, self.adapter, self.done, loss, figures or {}, exit_code=code, saved=self.saved)

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
        model.to(self.accelerator.device)
        if self.config.gradient_checkpointing:
            self.task.checkpoint_activations()
        return model

    def _prepare(self, chosen: Points) -> None:
        """The data, and how many steps follow from it."""
        tell = self.progress.message
        self.data = self.task.prepare(Setting(self.model, self.accelerator.device, chosen, tell))
        if len(self.data) == 0:
            raise ConfigError([f"data: {self.config.data} holds no example to train on"], "run")
        tell(f"{len(self.data)} examples from {self.config.data}")
        before = self.folder.run_before() if self.snapshot else None
        self.run = self._planned(self.run)
        self.config = self.run.config
        self.task.take(self.config)
        self._check_steps()
        for note in consequences(self._planned(before), self.run, self.done) if before else ():
            tell(note)

    def _planned(self, run: Run) -> Run:
        """The run with its number of steps, where it says epochs."""
        if run.config.epochs is None:
            return run
        each = run.config.batch_size * run.config.gradient_accumulation * self.accelerator.num_processes
        return with_steps(run, math.ceil(run.config.epochs * len(self.data) / each))

    @contextlib.contextmanager
    def _folder(self, record: DataRecord, *, keep: bool) -> Iterator[None]:
        """The run folder, which is withdrawn where a new run ends before its first step.

        Args:
            record: What the data is.
            keep: Leave what is in it as it is.
        """
        self.accelerator.wait_for_everyone()  # all have seen the folder as it was
        if not self.main:
            yield
            return
        fresh = self.overwrite or not self.folder.config.exists()
        if keep:
            self.folder.hold()
        else:
            self.folder.open(record, overwrite=self.overwrite)
            self.folder.start_metrics(self.done)
        try:
            yield
        except BaseException:
            if fresh and not self.done:
                self.folder.withdraw()
            raise

    def _start(self, components: set[str]) -> None:
        """Puts the adapter on, new or as it was."""
        if self.snapshot is not None:
            self.progress.message(f"resumed from {self.snapshot.folder}")
            self.learner.resume(self.snapshot)
        else:
            self._preview(0)
            self.learner.begin(lambda: self._observe(components), self.progress.message)
        self._train_mode(components)

    def _observe(self, components: set[str]) -> None:
        """Shows the adapter its inputs in the first batches, and their gradients, where its type starts from data."""
        batches, backward = self.run.adapter.observations, self.run.adapter.observes_gradients
        if not batches:
            return
        adapters, name = self.learner.adapters, self.learner.name
        with inference(self.model), torch.set_grad_enabled(backward), adapters.observing(name):
            if backward and self.config.gradient_checkpointing:
                self._train_mode(components)  # in evaluation models keep their activations
            for batch in itertools.islice(self._batches(), batches):
                loss = self.task.loss(to_device(batch, self.accelerator.device))
                if backward:
                    self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:  # each has seen data of its own, and all must start alike
            for tensor in adapters.state_dict(name).values():
                tensor.copy_(broadcast(tensor))

    def _train_mode(self, components: set[str]) -> None:
        """Train mode for the parts that the adapter acts in; the others only ever infer."""
        for name, part in parts_of(self.model).items():
            part.train(isinstance(self.model, nn.Module) or name in components)

    # -- the steps --------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Any]:
        micro = self.config.gradient_accumulation
        order = Order(
            size=len(self.data),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            first=self.done * micro,
            last=self.config.steps * micro,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            groups=groups_of(self.data),
        )
        return self.task.batches(iter(ordered(self.data, order, self.task.collate, self.config.num_workers)))

    def _steps(self) -> None:
        self.batches = self._batches()
        try:
            self.interrupt.stage = SAVING  # what follows the steps, until the adapter is written
            with self.interrupt.during(STEPS):
                self._until_done()
        finally:
            self.batches = iter(())  # ends the processes that read data, which ignore signals, whatever has happened

    def _until_done(self) -> None:
        while self.done < self.config.steps:
            self._step()
            if self._stopped():
                return
            if _every(self.config.checkpoint_every, self.done):
                self._save()
            if _every(self.config.sample_every, self.done) and self.done < self.config.steps:
                self._preview(self.done)
                if self._stopped():
                    return

    def _stopped(self) -> bool:
        """Whether a signal has come, in any process; a checkpoint is then saved."""
        stop = any_process(self.accelerator, self.interrupt.signal is not None)
        if stop:
            self._save()
        return stop

    def _step(self) -> None:
        began = time.monotonic()
        set_seed(derive_seed(self.config.seed, "step", self.done, self.accelerator.process_index) % 2**32)
        rate = self.learner.set_rates(factor(self.run, self.done))
        loss, seen, unit = self._backward()
        norm = self._clip()
        self.learner.step(self.done + 1, self.config.steps)
        self.done += 1
        seconds = round(time.monotonic() - began, 4)
        if self.main:
            record = {"step": self.done, "loss": loss, "lr": rate, "grad_norm": norm, "seconds": seconds, unit: seen}
            self.folder.record(record)
        self.progress.step(self.done, loss, rate, seen, unit)

    def _backward(self) -> tuple[float, int, str]:
        """Gradients of a step; its loss, and how much of what it has seen."""
        micro, seen, unit = self.config.gradient_accumulation, 0, ""
        total = torch.zeros((), device=self.accelerator.device)
        for _ in range(micro):
            batch = next(self.batches)
            amount, unit = self.task.amount(batch)
            seen += amount * self.accelerator.num_processes
            with self.accelerator.autocast():
                loss = self.task.loss(to_device(batch, self.accelerator.device)) + self.learner.adapters.penalty()
            self.accelerator.backward(loss / micro)
            total += loss.detach().float() / micro
        mean = float(mean_over_processes(self.accelerator, total))
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss of step {self.done + 1} is {mean}. Lower learning_rate (now {self.run.learning_rate:g})"
                f"{', or set mixed_precision=no' if self.config.mixed_precision != 'no' else ''}"
            )
        return mean, seen, unit

    def _clip(self) -> float | None:
        """Averages the gradients over the processes, and bounds their norm, which is returned where it is finite."""
        parameters = [p for p in self.learner.trained.parameters() if p.grad is not None]
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                parameter.grad = mean_over_processes(self.accelerator, parameter.grad)
        limit = self.config.max_grad_norm
        total: Any = self.accelerator.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        norm = float(total)
        return norm if math.isfinite(norm) else None  # fp16's loss scaler skips such a step and lowers its scale

    # -- what is written --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.saved == self.done:
            return
        if self.main:
            with self.interrupt.during(SAVING):
                self.learner.snapshot(self.folder.snapshots, self.done)
        self.saved = self.done
        self.accelerator.wait_for_everyone()

    def _preview(self, step: int) -> Mapping[str, float]:
        """Samples and figures at a step; training goes on as if it had not happened."""
        figures: Mapping[str, float] = {}
        written: list[Path] = []
        if self.main:
            try:
                with self._shown():
                    figures = self.task.evaluate()
                    written = self.previews.draw(step, self.learner.adapters if step else None)
            except KeyboardInterrupt:
                if self.interrupt.signal is None or not self.done:
                    raise
            if figures:
                self.folder.record({"step": step, **figures})
                measured = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
                self.progress.message(f"step {step}: {measured}")
            for line in told(step, self.previews.samples, written):
                self.progress.message(line)
        self.accelerator.wait_for_everyone()
        return figures

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """The model as samples and figures are made with it."""
        stage = SAMPLES if self.done else BEFORE
        with self.interrupt.during(stage), self.learner.in_use(), inference(self.model), writing(self.folder.samples):
            yield

    def _finish(self, *, early: bool) -> Result:
        """The adapter's file, then figures and samples."""
        if early:
            self.run = with_steps(self.run, self.done)
            self.config = self.run.config
            self.task.take(self.config)
        with self.interrupt.during(SAVING):
            if self.config.checkpoint_every and not early:
                self._save()
            if self.main:
                with writing(self.folder.adapter):
                    self.adapter = self.learner.save(self.folder.path)
        if any_process(self.accelerator, self.interrupt.signal is not None):
            return self.result()
        last = self._preview(self.done)
        figures: dict[str, Any] = {}
        if self.main and self.interrupt.signal is None:
            figures |= {f"base {key}": value for key, value in self.folder.base_figures().items()}
            with self._shown():
                figures |= {**last, **self.task.finish(self.folder.samples)}
                figures |= self.previews.finish(self.done, self.learner.adapters)
            with self.interrupt.during(SAMPLES), writing(self.folder.path):
                self._close(figures)
            self.folder.write_summary({"step": self.done, "early": early, "figures": figures})
        return self.result(figures)

    def _metadata(self) -> Mapping[str, str]:
        return metadata_of(self.config, self.task)

    def _close(self, figures: dict[str, Any]) -> None:
        """Files for other tools, checked, and the model card; which there are is told with the figures."""
        adapters, tell = self.learner.adapters, self.progress.message
        made = close(self.task, self.model, adapters, self.previews, self.folder, figures, tell)
        figures |= {f"for {one.format}": str(one.path) for one in made if not one.problem}


def _every(steps: int | None, step: int) -> bool:
    """Whether something that is done every so many steps is done at this one."""
    return steps is not None and step % steps == 0
