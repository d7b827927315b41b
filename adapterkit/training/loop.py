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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, set_seed
from torch import nn

from adapterkit.errors import ConfigError, TrainingError
from adapterkit.handle.adapters import Adapters
from adapterkit.handle.listing import points
from adapterkit.points import Points
from adapterkit.training.averages import Averages
from adapterkit.training.checked import CheckedTask
from adapterkit.training.data_record import DataRecord, resumed
from adapterkit.training.export.closing import close
from adapterkit.training.export.record import metadata_of
from adapterkit.training.interrupt import Interrupt
from adapterkit.training.order import Order, derive_seed, ordered
from adapterkit.training.parts import describe, inference, parts_of, to_device
from adapterkit.training.plan import foreseen
from adapterkit.training.processes import any_process, make_accelerator, mean_over_processes
from adapterkit.training.progress import Progress, make_progress
from adapterkit.training.rates import Rates, factor
from adapterkit.training.result import Result
from adapterkit.training.run import Run
from adapterkit.training.run_folder import RunFolder
from adapterkit.training.snapshots import ADAPTER, Snapshot, writing
from adapterkit.training.state import OPTIMIZER, OptimizerState, Trained, save_modules
from adapterkit.training.task import Dataset, Setting, groups_of


def train(
    run: Run,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changed_data: bool = False,
    silent: bool = False,
) -> Result:
    """Trains an adapter as a run says, and leaves everything in its folder.

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
    try:
        accelerator = make_accelerator(run)
        snapshot = folder.snapshots.newest() if resume else None
        trainer = Trainer(run, folder, accelerator, snapshot, overwrite=overwrite, silent=silent)
        return trainer.train(accept_changed_data=accept_changed_data)
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
        snapshot: Snapshot | None,
        *,
        overwrite: bool,
        silent: bool,
    ) -> None:
        self.run, self.config, self.folder, self.accelerator = run, run.config, folder, accelerator
        self.snapshot, self.done = snapshot, snapshot.step if snapshot else 0
        self.main = accelerator.is_main_process
        self.task = CheckedTask(run)
        self.overwrite, self.silent = overwrite, silent or not self.main
        self.losses: list[float] = []
        self.in_use: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
        self.saved: int | None = self.done if snapshot else None

    def train(self, *, accept_changed_data: bool) -> Result:
        """Everything from looking at the data to the last sample."""
        if self.done > self.config.steps:
            raise ConfigError([f"steps is {self.config.steps}, but {self.done} are done already"], "run")
        record = self._survey(accept_changed_data)
        if (outline := self.task.outline()) is not None:
            foreseen(self.run, outline)  # what does not fit is told before weights are read
        self.model = self._load_model()
        chosen = points(self.model, adapter=self.run.adapter)
        with make_progress(self.config.steps, self.done, self.config.log_every, silent=self.silent) as progress:
            progress.message(describe(self.model, chosen))
            for note in record.notes:
                progress.message(f"data: {note}")
            self.extra = self.task.extra_modules()
            self.rates = Rates(self.run, self.model, chosen, self.extra)
            self.data = self._prepare(chosen, record, progress)
            progress.message(f"{len(self.data)} examples from {self.config.data}")
            if self.snapshot is None:
                self._preview(0, progress)
            else:
                progress.message(f"resumed from {self.snapshot.folder}")
            self._attach(chosen)
            with Interrupt(silent=self.silent) as interrupt:
                self._steps(progress, interrupt)
            return self._finish(interrupt.exit_code, progress)

    # -- before the first step --------------------------------------------------------------------------------------

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

    def _prepare(self, chosen: Points, record: DataRecord, progress: Progress) -> Dataset:
        """The data; the run folder is made once it is known to be usable."""
        data = self.task.prepare(Setting(self.model, self.accelerator.device, chosen, progress.message))
        if len(data) == 0:
            raise ConfigError([f"data: {self.config.data} holds no example to train on"], "run")
        self.accelerator.wait_for_everyone()  # all have seen the folder as it was
        if self.main:
            self.folder.open(record, overwrite=self.overwrite)
            self.folder.start_metrics(self.done)
        return data

    def _attach(self, chosen: Points) -> None:
        """Puts the adapter on, with the snapshot's values if there is one, and makes the optimizer."""
        self.adapters = Adapters(self.model)
        name = self.config.adapter_name
        if self.snapshot is None:
            self.adapters.add(name, self.run.adapter, seed=self.config.seed)
            self._observe(name, self.run.adapter.observations, {point.component for point in chosen})
        else:
            self.adapters.load(self.snapshot.folder / ADAPTER, name)
            self.adapters.activate(name)
            self.adapters.train(name)
        self.trained = Trained(self.rates.trained(self.adapters.modules(name)), self.extra)
        optimizer = self._build_optimizer()
        self.state = OptimizerState(optimizer)
        if self.snapshot is not None:
            self.trained.restore(self.snapshot, self.state)
        self.averages = Averages(self.trained, optimizer, own=self.run.optimizer.averages, decay=self.config.ema)
        if self.snapshot is not None:
            self.averages.restore(self.snapshot)
        self.in_use = self.averages.in_use
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        if self.snapshot is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.snapshot.values["scaler"])
        self._train_mode({point.component for point in chosen})

    def _build_optimizer(self) -> torch.optim.Optimizer:
        chosen, rates = self.run.optimizer, self.trained.rates
        if chosen.one_rate and len({*rates}) > 1:
            several = ", ".join(f"{rate:g}" for rate in sorted({*rates}))
            told = f"it takes one learning rate for all parameters, and there are {several}"
            raise ConfigError([f"optimizer: {told}. They come from `rates`, or from the adapter's type"], "run")
        return chosen.build(self.trained.groups())

    def _observe(self, name: str, batches: int, components: set[str]) -> None:
        """Shows the adapter its inputs in the first batches, and their gradients, where its type starts from data."""
        if not batches:
            return
        backward = self.run.adapter.observes_gradients
        with inference(self.model), torch.set_grad_enabled(backward), self.adapters.observing(name):
            if backward and self.config.gradient_checkpointing:
                self._train_mode(components)  # in evaluation models keep their activations
            for batch in itertools.islice(self._batches(), batches):
                loss = self.task.loss(to_device(batch, self.accelerator.device))
                if backward:
                    self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:  # each has seen data of its own, and all must start alike
            for tensor in self.adapters.state_dict(name).values():
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

    def _steps(self, progress: Progress, interrupt: Interrupt) -> None:
        self.batches = self._batches()
        progress.begin()
        try:
            self._until_done(progress, interrupt)
        except KeyboardInterrupt:
            if interrupt.signal is None:
                raise
        finally:
            self.batches = iter(())  # ends the processes that read data, which ignore signals, whatever has happened

    def _until_done(self, progress: Progress, interrupt: Interrupt) -> None:
        while self.done < self.config.steps:
            self._step(progress)
            if any_process(self.accelerator, interrupt.signal is not None):
                self._save()
                return
            if self.config.checkpoint_every and self.done % self.config.checkpoint_every == 0:
                self._save()
            if self.config.sample_every and self.done % self.config.sample_every == 0 and self.done < self.config.steps:
                self._preview(self.done, progress)

    def _step(self, progress: Progress) -> None:
        began = time.monotonic()
        set_seed(derive_seed(self.config.seed, "step", self.done, self.accelerator.process_index) % 2**32)
        now = factor(self.run, self.done)
        for group, rate in zip(self.optimizer.param_groups, self.trained.rates, strict=True):
            group["lr"] = rate * now
        rate = self.run.learning_rate * now
        loss = self._backward()
        norm = self._clip()
        self.optimizer.step()
        self.done += 1
        self.adapters.after_step(self.done, self.config.steps)
        self.averages.after_step(self.done)
        self.optimizer.zero_grad()
        self.losses.append(loss)
        seconds = round(time.monotonic() - began, 4)
        if self.main:
            self.folder.record({"step": self.done, "loss": loss, "lr": rate, "grad_norm": norm, "seconds": seconds})
        progress.step(self.done, loss, rate)

    def _backward(self) -> float:
        micro = self.config.gradient_accumulation
        total = torch.zeros((), device=self.accelerator.device)
        for _ in range(micro):
            with self.accelerator.autocast():
                loss = self.task.loss(to_device(next(self.batches), self.accelerator.device)) + self.adapters.penalty()
            self.accelerator.backward(loss / micro)
            total += loss.detach().float() / micro
        mean = float(mean_over_processes(self.accelerator, total))
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss of step {self.done + 1} is {mean}. Lower learning_rate (now {self.run.learning_rate:g})"
                f"{', or set mixed_precision=no' if self.config.mixed_precision != 'no' else ''}"
            )
        return mean

    def _clip(self) -> float | None:
        """Averages the gradients over the processes, and bounds their norm, which is returned where it is finite."""
        parameters = [p for p in self.trained.parameters() if p.grad is not None]
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
            scaler = self.accelerator.scaler
            values = {"seed": self.config.seed, "scaler": scaler.state_dict() if scaler is not None else None}
            tensors = {OPTIMIZER: self.state.tensors(list(self.trained.named)), **self.averages.training_values()}
            with self.in_use():
                self.folder.snapshots.write(
                    self.done,
                    values,
                    {**tensors, **self.trained.tensors()},
                    self._save_adapter,
                )
        self.saved = self.done
        self.accelerator.wait_for_everyone()

    def _save_adapter(self, path: Path) -> None:
        self.adapters.save(self.config.adapter_name, path, metadata=metadata_of(self.config, self.task))

    def _preview(self, step: int, progress: Progress) -> Mapping[str, float]:
        """Samples and figures at a step; training goes on as if it had not happened."""
        figures: Mapping[str, float] = {}
        if self.main:
            with self.in_use(), inference(self.model), writing(self.folder.samples):
                figures = self.task.evaluate()
                written = self.task.preview(step, self.folder.samples)
            if figures:
                self.folder.record({"step": step, **figures})
                progress.message(f"step {step}: " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
            if written:
                progress.message(f"step {step}: {len(written)} samples in {self.folder.samples}")
        self.accelerator.wait_for_everyone()
        return figures

    def _finish(self, exit_code: int | None, progress: Progress) -> Result:
        tail = self.losses[-20:]
        loss = sum(tail) / len(tail) if tail else math.nan
        if self.done < self.config.steps:
            return Result(self.folder.path, None, self.done, loss, exit_code=exit_code or 0, saved=self.saved)
        self._save_final()
        last = self._preview(self.done, progress)
        figures: dict[str, Any] = {}
        if self.main:
            figures |= {f"base {key}": value for key, value in self.folder.base_figures().items()}
            with self.in_use(), writing(self.folder.samples):
                figures |= {**last, **self.task.finish(self.folder.samples)}
            with writing(self.folder.path):
                self._close(figures, progress)
        return Result(self.folder.path, self.folder.adapter, self.done, loss, figures, saved=self.saved)

    def _close(self, figures: dict[str, Any], progress: Progress) -> None:
        """Files for other tools, checked, and the model card; which there are is told with the figures."""
        made = close(self.config, self.task, self.model, self.adapters, self.folder, figures, progress.message)
        figures |= {f"for {one.format}": str(one.path) for one in made if not one.problem}

    def _save_final(self) -> None:
        if self.config.checkpoint_every:
            self._save()
        if self.main:
            with self.in_use(), writing(self.folder.adapter):
                self._save_adapter(self.folder.adapter)
                save_modules(self.task.extra_modules(), self.folder.path)
