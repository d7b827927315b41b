"""What a subclass of the checks says about its type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint
from adapterkit.testing.subject import NAME, Subject, skip, subjects, subjects_at


class Case:
    """The type under test. What it says of itself (`neutral`, `exact_gradients`) decides which checks apply.

    Attributes:
        config: A config of it.
    """

    config: ClassVar[ak.AdapterConfig]

    def prepare(self, adapters: ak.Adapters, config: ak.AdapterConfig) -> None:
        """Adds to a model what a config needs to be there before, such as the adapters that it combines."""

    def subjects(
        self, dtype: torch.dtype = torch.float64, *, seed: int = 0, fresh: bool = False, each: bool = False
    ) -> Iterator[Subject]:
        """The adapter on every tiny model where it can act; see `adapterkit.testing.subject.subjects`."""
        return subjects(self.config, dtype, seed=seed, fresh=fresh, each=each, prepare=self.prepare)

    def _subjects_at(self, role: str) -> Iterator[Subject]:
        """The adapter at one role alone."""
        return subjects_at(role, self.config, self.prepare)

    def _require_registered(self) -> Any:
        """The type's spec."""
        spec = ak.get_plugin_manager().spec_of(type(self.config))
        if spec is None:
            skip(f"{type(self.config).__name__} is not registered, so no file can name it")
        return spec

    def _require_checkpoint(self, subject: Subject) -> Checkpoint:
        """What a file holds of the adapter."""
        self._require_registered()
        return subject.adapters.checkpoint(NAME)
