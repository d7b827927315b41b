"""The keys that all tasks on language have."""

from __future__ import annotations

from pydantic import Field

from adapterkit.training.config import Section
from adapterkit.training.language.lengths import TooLong


class Reading(Section):
    """How data becomes examples.

    Attributes:
        columns: Which column says what, where its name does not: `{prompt: question, completion: answer}`.
        block_size: Most tokens of an example, or of a row of several.
        too_long: What becomes of longer examples: `split` into several, `cut` at the end, or `leave out`; by default
            texts are split, and conversations cut.
        validation: A file or folder to measure with, of the same kind as the data.
        validation_fraction: Without that, the share that is held out: of the rows, or of joined blocks the last ones.
    """

    columns: dict[str, str] = Field({})
    block_size: int = Field(512, gt=1)
    too_long: TooLong | None = None
    validation: str | None = None
    validation_fraction: float = Field(0.05, ge=0, lt=1)
