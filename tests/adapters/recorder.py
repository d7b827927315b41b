"""What a computation allocates, and what it keeps for its backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Seen = list[tuple[torch.dtype, int]]


class _Recorder(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.seen.append((value.dtype, value.numel()))
        return out


@contextlib.contextmanager
def recorded() -> Iterator[Seen]:
    """Notes dtype and number of elements of every tensor that is computed or saved inside the block."""
    seen: Seen = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append((tensor.dtype, tensor.numel()))
        return tensor

    with _Recorder(seen), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield seen
