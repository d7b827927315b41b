"""What was meant by a key that a run file does not have: the same key elsewhere, other tools' word for it, a slip."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from adapterkit.errors import did_you_mean, near_matches

_WORDS = {
    "accumulation": "gradient_accumulation",
    "base_model": "model",
    "blocks_to_swap": "block_swap",
    "bs": "batch_size",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "dataset": "data",
    "dim": "rank",
    "early_stopping_patience": "early_stop",
    "ema": "ema_decay",
    "enable_wildcard": "caption_lines",
    "grad_accum": "gradient_accumulation",
    "gradient_accumulation_steps": "gradient_accumulation",
    "image_size": "resolution",
    "img_size": "resolution",
    "instance_data_dir": "data",
    "instance_prompt": "caption",
    "logging_steps": "log_every",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lr": "learning_rate",
    "lr_scheduler": "scheduler",
    "lr_scheduler_type": "scheduler",
    "lr_warmup_steps": "warmup_steps",
    "max_steps": "steps",
    "max_train_epochs": "epochs",
    "max_train_steps": "steps",
    "micro_batch_size": "batch_size",
    "network_alpha": "alpha",
    "network_dim": "rank",
    "num_epochs": "epochs",
    "num_inference_steps": "sample_steps",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "optimizer_type": "optimizer",
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "precision": "mixed_precision",
    "pretrained_model_name_or_path": "model",
    "r": "rank",
    "sample_prompts": "prompts",
    "save_every": "checkpoint_every",
    "save_every_n_steps": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "size": "resolution",
    "target_modules": "targets",
    "train_batch_size": "batch_size",
    "train_data_dir": "data",
    "unet_lr": "learning_rate",
    "validation_prompt": "prompts",
    "warmup": "warmup_steps",
    "wd": "weight_decay",
}
"""Other tools' words, and the last part of our key. A word whose key is not there is no hint."""


def paths_of(section: type | None, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a pydantic model or a dataclass, those of nested models too; nothing of None."""
    if section is None:
        return
    fields: Mapping[str, Any] = (
        {field.name: field.type for field in dataclasses.fields(section) if field.init}
        if dataclasses.is_dataclass(section)
        else {name: field.annotation for name, field in section.model_fields.items()}  # type: ignore[attr-defined]
    )
    for name, annotation in fields.items():
        yield prefix + name
        for inner in (annotation, *get_args(annotation)):
            if isinstance(inner, type) and not isinstance(inner, types.GenericAlias) and issubclass(inner, BaseModel):
                yield from paths_of(inner, f"{prefix}{name}.")


def hint(path: str, known: Iterable[str]) -> str:
    """A sentence that says which key was probably meant, with a space before it; "" where none is near.

    Args:
        path: The key as it was written, such as `lr` or `options.rank`.
        known: Every key that the run has, dotted.
    """
    known = sorted(set(known))
    key = re.sub(r"[\s-]+", "_", path.rpartition(".")[2].strip().lower())
    for word in (key, _WORDS.get(key)):
        if found := [one for one in known if one.rpartition(".")[2] == word]:
            least = min(one.count(".") for one in found)  # such as learning_rate, before that of an entry of `rates`
            return f" Did you mean {' or '.join(repr(one) for one in found if one.count('.') == least)}?"
    section = path.rpartition(".")[0]
    beside = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == section}
    if near_matches(key, beside):
        return did_you_mean(key, beside)
    last: dict[str, str] = {}
    for one in known:
        last.setdefault(one.rpartition(".")[2], one)
    if close := near_matches(key, last):
        return f" Did you mean {' or '.join(repr(last[one]) for one in close)}?"
    return did_you_mean(key, beside)
