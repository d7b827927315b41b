"""How the examples of a step are divided among processes and forward passes: a resumed run keeps how many they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterkit.errors import ConfigError
from adapterkit.training.config import RunConfig
from adapterkit.training.run import Run


@dataclass(frozen=True)
class Portions:
    """The examples of one step.

    Attributes:
        batch_size: In one forward pass of one process.
        passes: Of each process.
        processes: That train together.
        together: Examples behind each other that are of one group, as of pictures of one size.
    """

    batch_size: int
    passes: int
    processes: int
    together: int

    @classmethod
    def of(cls, config: RunConfig, processes: int, before: Mapping[str, Any] | None = None) -> Portions:
        """As the run says; or as many examples as before, in batches that are not larger than it says.

        Args:
            config: The run.
            processes: That train together.
            before: What `record` gave when the run began.

        Raises:
            ConfigError: So many processes cannot share what a step had before.
        """
        size = config.batch_size
        if not before:
            return cls(size, config.gradient_accumulation, processes, size * processes)
        examples, together = before["examples"], before["together"]
        if examples % processes:
            fit = ", ".join(str(n) for n in range(1, examples + 1) if examples % n == 0)
            told = f"a step of this run has {examples} examples, which {processes} processes cannot share evenly"
            raise ConfigError([f"{told}; go on with one of {fit}"], "run")
        common = math.gcd(examples // processes, together)
        size = next(n for n in range(min(size, common), 0, -1) if common % n == 0)
        return cls(size, examples // processes // size, processes, together)

    @property
    def examples(self) -> int:
        """In a step."""
        return self.batch_size * self.passes * self.processes

    def record(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"examples": self.examples, "together": self.together}

    def applied(self, run: Run) -> Run:
        """The run with these."""
        changed = {"batch_size": self.batch_size, "gradient_accumulation": self.passes}
        return dataclasses.replace(run, config=run.config.model_copy(update=changed))

    def notes(self, config: RunConfig) -> list[str]:
        """A sentence, where they are not what the run says."""
        if (self.batch_size, self.passes) == (config.batch_size, config.gradient_accumulation):
            return []
        return [
            f"a step has {self.examples} examples, as before: batch_size {self.batch_size}, gradient_accumulation "
            f"{self.passes}, processes {self.processes}"
        ]
