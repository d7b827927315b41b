"""What a run takes of memory and disk, as far as shapes tell: known before a weight is read."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.errors import StateError
from adapterkit.points import Points
from adapterkit.training.loading import dtype_of
from adapterkit.training.parts import parts_of
from adapterkit.training.run import Run

_FLOAT32 = 4


@dataclass(frozen=True)
class Needs:
    """Bytes.

    Attributes:
        weights: The base, in the run's `dtype`.
        waiting: How much of that is on the host.
        training: The adapter, its gradient, its running average and what the optimizer remembers, in float32.
        disk: The checkpoints that are kept, one that is being written, the best, and the adapter's file.
    """

    weights: int
    training: int
    disk: int
    waiting: int = 0

    def __str__(self) -> str:
        on_host = f" ({told(self.waiting)} of it on the host)" if self.waiting else ""
        return (
            f"memory {told(self.weights)} for the base{on_host}, {told(self.training)} for what trains, "
            f"and activations on top; disk {told(self.disk)}"
        )


def needs_of(run: Run, model: Any, chosen: Points, waiting: int = 0) -> Needs:
    """What a run takes.

    Args:
        run: The run.
        model: The base, or its outline.
        chosen: Where the adapter will act.
        waiting: Bytes of the base that are on the host.
    """
    config, kept = run.config, run.optimizer.kept
    averaged = 1 if config.ema is not None or run.optimizer.averages else 0
    adapter = sum(chosen.costs.values()) * _FLOAT32
    numbers = sum(p.numel() for part in parts_of(model).values() for p in part.parameters())
    copies = config.keep_checkpoints + 1 if config.checkpoint_every else 1
    return Needs(
        weights=numbers * dtype_of(config.dtype).itemsize,
        waiting=waiting,
        training=round(adapter * (2 + kept + averaged)),
        disk=round(adapter * (copies * (1 + kept + averaged) + (1 if config.best is None else 2))),
    )


def check_room(output: Path, needs: Needs) -> None:
    """Says no where the disk cannot hold what the run writes.

    Raises:
        StateError: Its free bytes are fewer.
    """
    place = next(one for one in (output, *output.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(os.fspath(place)).free
    if free < needs.disk:
        raise StateError(
            f"output {output}: the run writes about {told(needs.disk)}, and its disk has {told(free)} free; choose "
            "another folder with output=FOLDER, or keep fewer checkpoints with keep_checkpoints=1"
        )


def told(count: int) -> str:
    """Bytes as people say them."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
