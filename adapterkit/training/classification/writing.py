"""A classifier in a folder, as timm or transformers write theirs: both load it without adapterkit."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapterkit.training.classification.preprocessing import Pixels, Processing
from adapterkit.training.classifiers import is_transformers


def write_classifier(model: Any, pixels: Pixels, classes: Sequence[str], folder: Path, *, several: bool) -> None:
    """Writes weights, config and what images are made into.

    Args:
        model: A classifier without adapters.
        pixels: What its images are made into.
        classes: What its outputs are called.
        folder: Is made.
        several: Whether an image may be of several classes.
    """
    if not is_transformers(model):
        hub: Any = importlib.import_module("timm.models")
        look = pixels.look
        data = {"input_size": (pixels.channels, *pixels.size), "mean": tuple(look.mean), "std": tuple(look.std)}
        hub.save_for_hf(model, str(folder), {"label_names": list(classes)}, safe_serialization=True, data_config=data)
        return
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: number for number, name in enumerate(classes)}
    if several:
        model.config.problem_type = "multi_label_classification"
    model.save_pretrained(folder)
    if isinstance(pixels.transform, Processing):
        pixels.transform.processor.save_pretrained(folder)
