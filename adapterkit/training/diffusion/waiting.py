"""Parts of a pipeline that steps do without: they wait on the CPU, and are on the device while something needs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn


class Waiting:
    """Sends modules to the CPU.

    Args:
        modules: None of them trains.
        device: Where they are needed.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self.modules, self.device = modules, device
        self._depth = 0
        self._move(torch.device("cpu"))

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """On the device within; a `with` inside of another does nothing."""
        if not self._depth:
            self._move(self.device)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for module in self.modules:
            module.to(device)
