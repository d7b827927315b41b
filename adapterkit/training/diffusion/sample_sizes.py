"""Sizes of samples that a model does not draw."""

from __future__ import annotations

from collections.abc import Sequence

from adapterkit.errors import ConfigError
from adapterkit.training.samples.sample import Sample


def check_sizes(samples: Sequence[Sample], multiple: int) -> None:
    """Refuses sizes that a model does not draw.

    Raises:
        ConfigError: Sides are no multiple of what the model has; with the place of each such prompt in its file.
    """
    problems = [
        f"{f'{one.where}: ' if one.where else ''}size {list(one.size)} of the prompt {one.prompt!r}: sides must be a "
        f"multiple of {multiple}"
        for one in samples
        if one.size is not None and (one.size[0] % multiple or one.size[1] % multiple)
    ]
    if problems:
        raise ConfigError([*dict.fromkeys(problems)], "options.prompts")
