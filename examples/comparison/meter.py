"""What a run costs, as a callback of the trainer: `callbacks: [meter]`.

Memory is what training adds to the model: the tensors that the forward pass of a step keeps for its backward pass, and
for every number that trains its value, its gradient and the two moments of AdamW, each of 4 bytes. Time is CPU time, so
that what else the machine does is not counted.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import adapterkit as ak
from adapterkit.specs import CallbackSpec
from adapterkit.training.events import Callback, Training
from adapterkit.training.parts import parts_of
from adapterkit.training.result import Result

FILE = "cost.json"
_BYTES = 4 * 4


class Meter(Callback):
    """Writes `cost.json` into the run folder."""

    def begin(self, training: Training) -> None:
        """Saved tensors are counted in the first step alone, so that the time of the others is theirs."""
        self._times: list[float] = []
        self._saved: dict[int, int] = {}
        self._counting: saved_tensors_hooks | None = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._counting.__enter__()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _stop_counting(self) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None

    def step(self, training: Training, record: Mapping[str, Any]) -> None:
        """See `Callback.step`."""
        self._times.append(time.process_time())
        if self._counting is None:
            return
        self._stop_counting()
        modules = parts_of(training.model).values()
        held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        trained = ak.Adapters(training.model).parameters(training.run.config.adapter_name)
        self._trained = sum(parameter.numel() for parameter in trained)
        own = {tensor.untyped_storage().data_ptr() for tensor in held}
        self._activations = sum(size for place, size in self._saved.items() if place not in own)

    def end(self, training: Training, result: Result) -> None:
        """See `Callback.end`."""
        self._stop_counting()
        steps = [later - before for before, later in zip(self._times, self._times[1:], strict=False)]
        if not steps:
            return
        cost = {
            "trained": self._trained,
            "memory": self._activations + _BYTES * self._trained,
            "activations": self._activations,
            "step": statistics.median(steps),
        }
        (training.folder / FILE).write_text(json.dumps(cost), encoding="utf-8")


@ak.hookimpl
def adapterkit_register_callbacks() -> list[CallbackSpec]:
    """The one callback."""
    return [CallbackSpec("meter", "examples.comparison.meter:Meter", summary="what a run costs")]
