"""The adapter on the model, its optimizer and its averages: what learns, and what of it is saved."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from adapterkit.adapter import AdapterConfig
from adapterkit.errors import AdapterKitError, ConfigError
from adapterkit.handle.adapters import Adapters
from adapterkit.points import Points
from adapterkit.training.averages import Averages
from adapterkit.training.parts import inference, parts_of
from adapterkit.training.rates import Rates
from adapterkit.training.run import Run
from adapterkit.training.snapshots import ADAPTER, Snapshot, Snapshots
from adapterkit.training.state import OPTIMIZER, OptimizerState, Trained, load_modules, own_state, save_modules


class Learner:
    """Nothing is on the model until `begin` or `resume`.

    Args:
        run: The run.
        model: The base, on its device.
        chosen: The configs of the adapter, each with its points.
        extra: What else trains, by file name.
        accelerator: What it trains on.
        metadata: What the adapter's file says of the run.

    Attributes:
        adapters: The handle on the model.
        trained: Every parameter that trains.
        optimizer: Theirs.
        in_use: A context in which the parameters have the values that samples, figures and files are of.
    """

    def __init__(
        self,
        run: Run,
        model: Any,
        chosen: Sequence[tuple[AdapterConfig, Points]],
        extra: Mapping[str, nn.Module],
        accelerator: Accelerator,
        metadata: Callable[[], Mapping[str, str]],
    ) -> None:
        self.run, self.name, self.extra, self._metadata = run, run.config.adapter_name, extra, metadata
        self._model, self._accelerator, self._chosen = model, accelerator, chosen
        self._components = {point.component for _, points in chosen for point in points}
        self._rates = Rates(run, model, chosen, extra)
        self._attached = False
        self.in_use: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext

    def attach(self, snapshot: Snapshot | None) -> None:
        """Puts the adapter on: as `begin` and `resume` do, where nobody has before.

        Args:
            snapshot: The checkpoint that has its values; None for a new one.
        """
        self.adapters, self._attached = Adapters(self._model), True
        if snapshot is None:
            self.adapters.add(self.name, [config for config, _ in self._chosen], seed=self.run.config.seed)
        else:
            self.adapters.load(snapshot.folder / ADAPTER, self.name)
            self.adapters.activate(self.name)
            self.adapters.train(self.name)

    def acted_in(self) -> dict[str, nn.Module]:
        """The parts of the model that the adapter acts in, by name."""
        parts = parts_of(self._model)
        return {n: part for n, part in parts.items() if isinstance(self._model, nn.Module) or n in self._components}

    def bare(self) -> AbstractContextManager[None]:
        """The base as it is without the adapter, before `begin` or `resume`."""
        return self.adapters.disabled() if self._attached else contextlib.nullcontext()

    def begin(self, observe: Callable[[], None], tell: Callable[[str], object]) -> None:
        """Puts a new adapter on.

        Args:
            observe: Shows it batches, where its type starts from data.
            tell: Takes a line for the user.

        Raises:
            ConfigError: The file that it is to begin from does not fit.
        """
        if not self._attached:
            self.attach(None)
        if self.run.config.init_from is None:
            observe()
        else:
            self._read(Path(self.run.config.init_from), tell)
        self._prepare(None)

    def resume(self, snapshot: Snapshot) -> None:
        """Puts the adapter of a checkpoint on, and goes on from there bit for bit.

        Raises:
            CheckpointError: It is of other parameters.
        """
        if not self._attached:
            self.attach(snapshot)
        self._prepare(snapshot)

    def _read(self, path: Path, tell: Callable[[str], object]) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.adapters.load_into(self.name, path, strict=False)
            except AdapterKitError as error:
                raise ConfigError([f"init_from: {error}"], "run") from error
        for warning in caught:
            tell(f"init_from: {warning.message}")

    def _prepare(self, snapshot: Snapshot | None) -> None:
        self.trained = Trained(self._rates.trained(self.adapters.modules(self.name)), self.extra)
        optimizer = self._build_optimizer()
        self._state = OptimizerState(optimizer)
        if snapshot is not None:
            self.trained.restore(snapshot, self._state)
        self._averages = Averages(self.trained, optimizer, own=self.run.optimizer.averages, decay=self.run.config.ema)
        self.optimizer = self._accelerator.prepare_optimizer(optimizer)
        if snapshot is not None:
            self._averages.restore(snapshot)
            if self._accelerator.scaler is not None:
                self._accelerator.scaler.load_state_dict(snapshot.values["scaler"])
        self.in_use = self._averages.in_use
        self._compile()

    def _compile(self) -> None:
        """Compiles the parts that the adapter acts in, which stay the modules that they are."""
        chosen = self.run.config.torch_compile
        if chosen is None:
            return
        for part in self.acted_in().values():
            part.compile(**chosen.model_dump())

    def _build_optimizer(self) -> torch.optim.Optimizer:
        chosen, rates = self.run.optimizer, self.trained.rates
        if chosen.one_rate and len({*rates}) > 1:
            several = ", ".join(f"{rate:g}" for rate in sorted({*rates}))
            told = f"it takes one learning rate for all parameters, and there are {several}"
            raise ConfigError([f"optimizer: {told}. They come from `rates`, or from the adapter's type"], "run")
        return chosen.build(self.trained.groups())

    def train_mode(self) -> None:
        """Train mode for the parts that the adapter acts in; the others only ever infer."""
        acted = self.acted_in()
        for name, part in parts_of(self._model).items():
            part.train(name in acted)

    def set_rates(self, factor: float) -> float:
        """Gives the optimizer its rates, multiplied by what the schedule says; the run's own is returned."""
        for group, rate in zip(self.optimizer.param_groups, self.trained.rates, strict=True):
            group["lr"] = rate * factor
        return self.run.learning_rate * factor

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Evaluation mode, without gradients, with the values in use; nothing is compiled for it."""
        eager = torch.compiler.set_stance("force_eager") if self.run.config.torch_compile else contextlib.nullcontext()
        with self.in_use(), inference(self._model), eager:
            yield

    def adopt(self, folder: Path | None) -> None:
        """Takes the values that `save` wrote, for good: no step follows.

        Args:
            folder: Where; None in the processes that take them from the first.
        """
        self.in_use = contextlib.nullcontext
        if folder is not None:
            self.adapters.load_into(self.name, folder / ADAPTER)
            load_modules(self.extra, folder)
        self.share()

    @torch.no_grad()
    def share(self) -> None:
        """Gives all processes the values of the first."""
        if self._accelerator.num_processes == 1:
            return
        extra = (tensor for module in self.extra.values() for tensor in own_state(module).values())
        for tensor in (*self.adapters.state_dict(self.name).values(), *extra):
            tensor.copy_(broadcast(tensor.clone()))

    def step(self, step: int, steps: int) -> None:
        """Optimizer step number `step`, from 1, of `steps`, with the gradients that there are."""
        self.optimizer.step()
        self.adapters.after_step(step, steps)
        self._averages.after_step(step)
        self.optimizer.zero_grad()

    def snapshot(self, snapshots: Snapshots, step: int, portions: Mapping[str, int]) -> Path:
        """Writes a checkpoint; `portions` is what is kept of how a step is divided."""
        scaler = self._accelerator.scaler
        values: dict[str, Any] = {"seed": self.run.config.seed, "portions": dict(portions)}
        values["scaler"] = scaler.state_dict() if scaler is not None else None
        tensors = {OPTIMIZER: self._state.tensors(list(self.trained.named)), **self._averages.training_values()}
        with self.in_use():
            return snapshots.write(step, values, {**tensors, **self.trained.tensors()}, self._save_adapter)

    def _save_adapter(self, path: Path) -> None:
        self.adapters.save(self.name, path, metadata=self._metadata())

    def save(self, folder: Path) -> Path:
        """Writes the adapter, and what else trains, with the values in use; returns the adapter's file."""
        with self.in_use():
            self._save_adapter(folder / ADAPTER)
            save_modules(self.extra, folder)
        return folder / ADAPTER
