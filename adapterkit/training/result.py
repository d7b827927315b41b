"""What a run came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        folder: The run folder.
        adapter: The adapter's file; None where the run was interrupted before it was written.
        step: Optimizer steps done in all.
        loss: Mean loss of the last steps (up to 20); NaN where there was none.
        figures: What the task measured.
        failed: What was to be written at the end beside the adapter, and is not what was trained, or is not there.
        exit_code: 129, 130 or 143 where a signal ended the run, else 0.
        speed: Steps, and examples or tokens, per second, samples included.
        peak_memory: Bytes in use at most: of the GPU, or of the process where there is none.
        finished_before: Whether nothing was left to do.
        saved: The step of the newest checkpoint that this session has written or begun with; None where there is none.
    """

    folder: Path
    adapter: Path | None
    step: int
    loss: float
    figures: Mapping[str, Any] = field(default_factory=dict)
    failed: Sequence[str] = ()
    exit_code: int = 0
    saved: int | None = None
    speed: str = ""
    peak_memory: int = 0
    finished_before: bool = False
