"""A task from outside of adapterkit, registered as a plug-in: next-token prediction on the toy model."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import adapterkit as ak
from adapterkit.specs import TaskSpec
from adapterkit.testing import toys
from adapterkit.training.config import Section
from adapterkit.training.order import Draw
from adapterkit.training.run import Run, load_run
from adapterkit.training.task import Sample, Setting, Task

EXAMPLES = 7


class Options(Section):
    poison: int | None = None  # the loss of this call is not a number
    signal_at: int | None = None  # the process gets a signal in this call of the loss
    signal_number: int = int(signal.SIGTERM)
    signals: int = 1  # how many it gets
    scale: float = Field(1.0, gt=0)


class Sequences:
    def __init__(self) -> None:
        self.tokens = toys.ids(EXAMPLES, 6, seed=11)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        shift = torch.randint(toys.VOCABULARY, (), generator=draw.generator())
        return {"tokens": (self.tokens[draw.index] + shift) % toys.VOCABULARY}


class ToyTask(Task):
    Options = Options
    options: Options
    calls = 0

    def load_model(self) -> Any:
        self.model = toys.ToyModel(seed=3)
        return self.model

    def prepare(self, setting: Setting) -> Sequences:
        self.setting = setting
        return Sequences()

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        self.calls += 1
        if self.calls == self.options.signal_at:
            for _ in range(self.options.signals):
                os.kill(os.getpid(), self.options.signal_number)
        tokens = batch["tokens"]
        loss = F.cross_entropy(self.model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return loss * float("nan") if self.calls == self.options.poison else loss * self.options.scale

    def evaluate(self) -> Mapping[str, float]:
        tokens = Sequences().tokens
        return {"entropy": F.cross_entropy(self.model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()}

    def samples(self) -> list[Sample]:
        return [Sample("one"), Sample("two", number=1)]

    def generate(self, sample: Sample, path: Path) -> None:
        torch.rand(5)  # a sample may use the global generator
        path.write_text(f"{sample.prompt} {sample.seed} {self.model.training}", encoding="utf-8")


@ak.hookimpl
def adapterkit_register_tasks() -> list[TaskSpec]:
    return [TaskSpec("toy-task", f"{__name__}:ToyTask", summary="for tests")]


def register() -> None:
    toys.register()
    manager = ak.get_plugin_manager()
    if "toy-task" not in manager.tasks():
        manager.register(sys.modules[__name__], name="toy_tasks")


def toy_run(folder: Path, *overrides: str, **values: Any) -> Run:
    """A run of eight short steps."""
    register()
    defaults: dict[str, Any] = {
        "task": "toy-task",
        "model": "toy",
        "data": "toy",
        "output": str(folder),
        "adapter": {"type": "lora", "rank": 2, "targets": "attn.* mlp.*", "dropout": 0.3},
        "steps": 8,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "scheduler": "cosine",
        "checkpoint_every": 2,
    }
    given = [
        f"{key}={json.dumps(value)}" for key, value in {**defaults, **values}.items() if (key, value) != ("steps", None)
    ]
    return load_run(None, [*given, *overrides])
