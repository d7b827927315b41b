"""The keys that all tasks on language have."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from adapterkit.errors import ConfigError
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
        cache: A folder that keeps tokens, for this run when it is resumed and for others; by default they lie in files
            without a name, beside the run folder, while it trains.
    """

    columns: dict[str, str] = Field({})
    block_size: int = Field(512, gt=1)
    too_long: TooLong | None = None
    validation: str | None = None
    validation_fraction: float = Field(0.05, ge=0, lt=1)
    cache: str | None = Field(None, min_length=1)


def check_length(model: Any, size: int) -> None:
    """Says no where examples may be longer than a model of transformers reads.

    Raises:
        ConfigError: They are.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and size > limit:
        told = f"the model reads at most {limit} tokens, not {size}; set options.block_size={limit}, or a smaller one"
        raise ConfigError([f"options.block_size: {told}"], "run")
