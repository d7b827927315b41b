"""Which parts of a pipeline are on the device: those that are not needed wait on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch

from adapterkit.training.parts import parts_of

_HOME = torch.device("cpu")


class Residence:
    """Brings parts to the device, and takes them back.

    Args:
        pipe: The pipeline, whose parts are where they were loaded.
        device: Where it computes.
        guests: The components that are there only while they are needed.
    """

    def __init__(self, pipe: Any, device: torch.device, guests: Collection[str]) -> None:
        self.parts, self.device = parts_of(pipe), device
        self.away = {name for name in guests if name in self.parts and device != _HOME}
        for name in self.parts.keys() - self.away:
            self.parts[name].to(device)

    def stay(self, names: Collection[str]) -> None:
        """Brings components for good."""
        for name in self.away & {*names}:
            self.parts[name].to(self.device)
        self.away -= {*names}

    @contextlib.contextmanager
    def needing(self, names: Collection[str] | None = None) -> Iterator[None]:
        """The components, or all, are on the device in the block."""
        called = self.away if names is None else self.away & {*names}
        self.away = self.away - called
        for name in called:
            self.parts[name].to(self.device)
        try:
            yield
        finally:
            for name in called:
                self.parts[name].to(_HOME)
            self.away = self.away | called
