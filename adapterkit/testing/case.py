"""What a subclass of the checks says about its type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

import adapterkit as ak
from adapterkit.testing.subject import Subject, subjects


class Case:
    """The type under test. What it says of itself (`neutral`, `exact_gradients`) decides which checks apply.

    Attributes:
        config: A config of it.
    """

    config: ClassVar[ak.AdapterConfig]

    def prepare(self, adapters: ak.Adapters, config: ak.AdapterConfig) -> None:
        """Adds to a model what a config needs to be there before, such as the adapters that it combines."""

    def subjects(self, dtype: torch.dtype = torch.float64, *, seed: int = 0, fresh: bool = False) -> Iterator[Subject]:
        """The adapter on every tiny model where it can act; see `adapterkit.testing.subject.subjects`."""
        return subjects(self.config, dtype, seed=seed, fresh=fresh, prepare=self.prepare)
