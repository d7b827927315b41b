"""Whether a run may go on as it is configured now: what a step computes must be the same; all else may differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterkit.errors import ConfigError
from adapterkit.training.config import FREE_ON_RESUME, read_values
from adapterkit.training.rates import factor
from adapterkit.training.run import Run, check_run


def read_run(path: Path) -> Run:
    """The run that a run folder's configuration describes.

    Raises:
        ConfigError: It is damaged, or of a release whose keys were others.
    """
    problems: list[str] = []
    run = check_run(read_values(path, (), problems), problems)
    if problems or run is None:
        raise ConfigError(problems, str(path))
    return run


def check_same(before: Run, now: Run, path: Path) -> None:
    """Refuses a run that computes other steps than it began with.

    Raises:
        ConfigError: Naming every key that differs, with both values.
    """
    free = FREE_ON_RESUME | {f"options.{name}" for name in now.task.free_options}
    changed = [
        f"{key} is {new!r}, but the run began with {old!r}"
        for key, old, new in differences(before.resolved(), now.resolved())
        if not any(key == one or key.startswith(f"{one}.") for one in free)
    ]
    if changed:
        raise ConfigError([*changed, "only a run of the same configuration can be resumed"], str(path))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, value before and value now, of all that differ."""
    for key in dict.fromkeys((*now, *before)):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
            yield from differences(old, new, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", old, new


def consequences(before: Run, now: Run, done: int) -> list[str]:
    """What follows from another number of steps: a sentence, where the learning rate jumps.

    Args:
        before, now: With their numbers of steps.
        done: How many have been made.
    """
    was, becomes = before.config.steps, now.config.steps
    if was == becomes or not 0 < done < becomes:
        return []
    then, next_ = factor(before, done - 1), factor(now, done)
    longest = max(abs(factor(now, done) - factor(now, done - 1)), abs(factor(before, done - 1) - factor(before, done)))
    if abs(next_ - then) <= 2 * longest:
        return []
    rate = now.learning_rate
    kind = now.resolved()["scheduler"]["type"]
    return [
        f"steps is {becomes}, and the run began with {was}: the schedule {kind} is drawn over them anew, so the "
        f"learning rate of step {done + 1} is {rate * next_:.2e}, where that of step {done} was {rate * then:.2e}"
    ]


def with_steps(run: Run, steps: int) -> Run:
    """The run with a number of steps."""
    return dataclasses.replace(run, config=run.config.model_copy(update={"steps": steps}))


def planned(run: Run, examples: int, each: int) -> Run:
    """The run with its number of steps, where it says epochs.

    Args:
        run: The run.
        examples: In one epoch.
        each: In a step.
    """
    epochs = run.config.epochs
    return run if epochs is None else with_steps(run, math.ceil(epochs * examples / each))
