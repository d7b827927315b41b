"""Optimizer steps: batches in their order, gradients, their norm, and what the step was like."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from adapterkit.errors import TrainingError
from adapterkit.training.checked import CheckedTask
from adapterkit.training.learner import Learner
from adapterkit.training.order import Order, derive_seed
from adapterkit.training.parts import inference, to_device
from adapterkit.training.portions import Portions
from adapterkit.training.processes import average_gradients, mean_over_processes
from adapterkit.training.rates import factor
from adapterkit.training.reading_processes import read_batches
from adapterkit.training.run import Run
from adapterkit.training.task import Dataset, groups_of


class Steps:
    """Makes the steps of a run.

    Args:
        run: With its number of steps.
        task: What turns batches into losses.
        learner: What learns.
        accelerator: What computes.
        data: The examples.
        done: Steps that are made already.
        portions: How the examples of a step are divided.
    """

    def __init__(
        self,
        run: Run,
        task: CheckedTask,
        learner: Learner,
        accelerator: Accelerator,
        data: Dataset,
        done: int,
        portions: Portions,
    ) -> None:
        self._run, self._task, self._learner, self._accelerator, self._data = run, task, learner, accelerator, data
        self._first, self._portions = done, portions
        self._batches: Iterator[Any] | None = None

    def batches(self) -> Iterator[Any]:
        """All that are left, in their order."""
        config, portions = self._run.config, self._portions
        order = Order(
            size=len(self._data),
            batch_size=portions.batch_size,
            seed=config.seed,
            first=self._first * portions.passes,
            last=config.steps * portions.passes,
            rank=self._accelerator.process_index,
            world=portions.processes,
            groups=groups_of(self._data),
            together=portions.together,
        )
        return self._task.batches(read_batches(self._data, order, self._task.collate, config.num_workers))

    def observe(self, model: Any) -> None:
        """Shows the adapter its inputs in the first batches, and their gradients, where its type starts from data."""
        adapter, adapters, name = self._run.adapter, self._learner.adapters, self._learner.name
        if not adapter.observations:
            return
        backward = adapter.observes_gradients
        with inference(model), torch.set_grad_enabled(backward), adapters.observing(name):
            if backward and self._run.config.gradient_checkpointing:
                self._learner.train_mode()  # in evaluation models keep their activations
            for batch in itertools.islice(self.batches(), adapter.observations):
                loss = self._task.loss(to_device(batch, self._accelerator.device))
                if backward:
                    self._accelerator.backward(loss)
        self._learner.share()  # each process has seen data of its own, and all must start alike

    def make(self, done: int) -> tuple[dict[str, Any], str]:
        """Makes one step.

        Args:
            done: How many are made already.

        Returns:
            The record for the metrics, and under which name it has how much was seen.

        Raises:
            TrainingError: The loss is not finite.
        """
        began = time.monotonic()
        set_seed(derive_seed(self._run.config.seed, "step", done, self._accelerator.process_index) % 2**32)
        rate = self._learner.set_rates(factor(self._run, done))
        loss, seen, unit = self._backward(done)
        norm = self._clip()
        self._learner.step(done + 1, self._run.config.steps)
        seconds = round(time.monotonic() - began, 4)
        return {"step": done + 1, "loss": loss, "lr": rate, "grad_norm": norm, "seconds": seconds, unit: seen}, unit

    def close(self) -> None:
        """Ends the processes that read data, which ignore signals: nothing else may refer to what feeds from them."""
        self._batches = None

    def _next(self) -> Any:
        if self._batches is None:
            self._batches = self.batches()
        return next(self._batches)

    def _backward(self, done: int) -> tuple[float, int, str]:
        """Gradients of a step; its loss, and how much of what it has seen."""
        accelerator, micro = self._accelerator, self._portions.passes
        total, seen, unit = torch.zeros((), device=accelerator.device), 0, ""
        drawn = [self._next() for _ in range(micro)]
        weights = [self._task.weight(batch) for batch in drawn]
        share = float(mean_over_processes(accelerator, torch.tensor(sum(weights) / micro, device=accelerator.device)))
        for batch, weight in zip(drawn, weights, strict=True):
            amount, unit = self._task.amount(batch)
            seen += amount * accelerator.num_processes
            with accelerator.autocast():
                loss = self._task.loss(to_device(batch, accelerator.device)) * (weight / share)
                loss = loss + self._learner.adapters.penalty()
            accelerator.backward(loss / micro)
            total += loss.detach().float() / micro
        mean = float(mean_over_processes(accelerator, total))
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss of step {done + 1} is {mean}. Lower learning_rate (now {self._run.learning_rate:g})"
                f"{', or set mixed_precision=no' if self._run.config.mixed_precision != 'no' else ''}"
            )
        return mean, seen, unit

    def _clip(self) -> float | None:
        """Averages the gradients over the processes, and bounds their norm, which is returned where it is finite."""
        average_gradients(self._accelerator, list(self._learner.trained.parameters()))
        parameters = [p for p in self._learner.trained.parameters() if p.grad is not None]
        limit = self._run.config.max_grad_norm
        total: Any = self._accelerator.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        norm = float(total)
        return norm if math.isfinite(norm) else None  # fp16's loss scaler skips such a step and lowers its scale


def every(steps: int | None, step: int) -> bool:
    """Whether something that is done every so many steps is done at this one."""
    return steps is not None and step % steps == 0
