"""What a run takes of memory and disk, as far as shapes tell: known before a weight is read."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.errors import StateError
from adapterkit.points import Points
from adapterkit.training.config import RunConfig
from adapterkit.training.loading import dtype_of
from adapterkit.training.parts import parts_of

_FLOAT32 = 4
_MOMENTS = 2  # of Adam and its kin, each as large as the adapter; no optimizer here keeps more


@dataclass(frozen=True)
class Needs:
    """Bytes.

    Attributes:
        weights: The base, in the run's `dtype`.
        training: The adapter, its gradient and the optimizer's moments, in float32.
        disk: The checkpoints that are kept, one that is being written, and the adapter's file.
    """

    weights: int
    training: int
    disk: int

    def __str__(self) -> str:
        return (
            f"memory {told(self.weights)} for the base, {told(self.training)} for what trains, and activations on top; "
            f"disk {told(self.disk)}"
        )


def needs_of(config: RunConfig, model: Any, chosen: Points) -> Needs:
    """What a run takes.

    Args:
        config: The run.
        model: The base, or its outline.
        chosen: Where the adapter will act.
    """
    adapter = sum(chosen.costs.values()) * _FLOAT32
    numbers = sum(p.numel() for part in parts_of(model).values() for p in part.parameters())
    copies = config.keep_checkpoints + 1 if config.checkpoint_every else 1
    return Needs(
        weights=numbers * dtype_of(config.dtype).itemsize,
        training=adapter * (2 + _MOMENTS),
        disk=copies * adapter * (1 + _MOMENTS) + adapter,
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
