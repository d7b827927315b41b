"""Which of the processes that torchrun or `accelerate launch` has started together speaks."""

from __future__ import annotations

import os
from datetime import timedelta

_SECONDS = 10
"""How long a process waits for the one that knows who was the first to fail."""


def is_first() -> bool:
    """Whether this process tells what a run comes to."""
    return os.environ.get("RANK", "0") == "0"


def tells_error() -> bool:
    """Whether this process tells of its error: the first that fails does, as the others' errors follow from that."""
    told = os.environ
    if told.get("WORLD_SIZE", "1") == "1" or told.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - its documentation has it

    try:
        place = told["MASTER_ADDR"], int(told["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=_SECONDS))
        return store.add(f"adapterkit/failed/{told.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (RuntimeError, KeyError, ValueError):  # the launcher is gone, or is another one
        return True
