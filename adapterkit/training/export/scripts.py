"""What kohya's scripts write into a file of the training, and the UIs show: `ss_*`."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.training.config import RunConfig
from adapterkit.training.sizes import Size

_MOST = 500
"""Tags of a folder that a file tells, of captions the most frequent ones."""


@dataclass(frozen=True)
class Shown:
    """A picture as the scripts count it: the name of its folder, its caption, and how often it is shown."""

    folder: str
    caption: str
    repeats: int = 1


def scripts_metadata(config: RunConfig, pictures: Sequence[Shown], size: Size) -> Mapping[str, str]:
    """The training by those names.

    Args:
        config: The run.
        pictures: What is learnt from.
        size: Height and width of the pictures.
    """
    counts = collections.Counter(one.folder for one in pictures)
    repeats = {one.folder: one.repeats for one in pictures}
    tags: dict[str, collections.Counter[str]] = {folder: collections.Counter() for folder in counts}
    for one in pictures:
        tags[one.folder].update(tag for part in one.caption.split(",") if (tag := part.strip()))
    folders = {name: {"n_repeats": repeats[name], "img_count": count} for name, count in counts.items()}
    rate = {} if config.learning_rate is None else {"ss_learning_rate": str(config.learning_rate)}
    return {
        **rate,
        "ss_sd_model_name": Path(config.model).name,
        "ss_num_train_images": str(len(pictures)),
        "ss_dataset_dirs": json.dumps(folders),
        "ss_tag_frequency": json.dumps({name: dict(found.most_common(_MOST)) for name, found in tags.items()}),
        "ss_resolution": f"({size[1]}, {size[0]})",
        "ss_steps": str(config.steps),
        "ss_max_train_steps": str(config.steps),
        "ss_batch_size_per_device": str(config.batch_size),
        "ss_gradient_accumulation_steps": str(config.gradient_accumulation),
        "ss_gradient_checkpointing": str(config.gradient_checkpointing),
        "ss_lr_scheduler": _method(config.scheduler),
        "ss_optimizer": _method(config.optimizer),
        "ss_lr_warmup_steps": str(config.warmup_steps),
        "ss_max_grad_norm": str(config.max_grad_norm),
        "ss_mixed_precision": config.mixed_precision,
        "ss_seed": str(config.seed),
        "modelspec.resolution": f"{size[1]}x{size[0]}",
    }


def _method(given: str | Mapping[str, Any]) -> str:
    """A method's name, and what it was told: `cosine(cycles=2)`."""
    if isinstance(given, str):
        return given
    told = ", ".join(f"{key}={value}" for key, value in given.items() if key != "type")
    return f"{given['type']}({told})"
