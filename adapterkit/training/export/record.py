"""What an adapter's own file says of its training, so that whoever has the file alone can sample as the run did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterkit.formats import strict_json
from adapterkit.formats.strict_json import StrictJSONError
from adapterkit.training.config import RunConfig
from adapterkit.training.task import Task

KEY = "adapterkit.training"
TRIGGER = "modelspec.trigger_phrase"


@dataclass(frozen=True)
class Record:
    """What a file says of its training.

    Attributes:
        task: The task's name.
        model: The base; see `public_name`.
        trigger: The words that call what was learnt.
        options: Those of the task that samples depend on.
        classes: The names of the classes by number, where there are any.
    """

    task: str
    model: str
    trigger: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()


def metadata_of(config: RunConfig, task: Task) -> dict[str, str]:
    """A file's metadata: the record, and what the task says of the training; the same for equal runs."""
    options = task.options.model_dump(mode="json")
    trigger = trigger_of(config, task)
    record = {
        "task": config.task,
        "model": public_name(config.model),
        "trigger": trigger,
        "options": {name: options[name] for name in task.sampling},
    }
    if classes := list(task.class_names()):
        record["classes"] = classes
    known = {TRIGGER: trigger} if trigger else {}
    return {KEY: json.dumps(record, sort_keys=True), **task.metadata(), **known}


def public_name(model: str) -> str:
    """What a file that is passed on calls the base: of an absolute path the last name alone."""
    return Path(model).name if Path(model).is_absolute() else model


def trigger_of(config: RunConfig, task: Task) -> str:
    """What the run's card says, or else what the task knows."""
    return config.card.trigger or ", ".join(task.triggers())


def record_in(metadata: Mapping[str, str]) -> Record | None:
    """What metadata says; None where it has no record, or one that this release cannot read."""
    try:
        found = strict_json.loads(metadata.get(KEY, "").encode())
    except StrictJSONError:
        return None
    shape = {"task": str, "model": str, "trigger": str, "options": dict}
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in shape.items()):
        return None
    classes = found.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return None
    return Record(**{name: found[name] for name in shape}, classes=tuple(classes))
