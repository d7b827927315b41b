"""A classifier in a folder, as timm or transformers write theirs: both load it without adapterkit."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from adapterkit.formats.files import write_atomically
from adapterkit.formats.registry import find_format
from adapterkit.formats.source import Source
from adapterkit.points import Points
from adapterkit.training.classification.positions import made_for_size
from adapterkit.training.classification.preprocessing import Pixels
from adapterkit.training.classification.processors import Processing
from adapterkit.training.classifiers import is_transformers
from adapterkit.training.loading import bars_on_terminals_only


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
        names = {"label_names": list(classes)}
        hub.save_for_hf(model, str(folder), names, safe_serialization=True, data_config=dict(pixels.told))
        return
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: number for number, name in enumerate(classes)}
    if several:
        model.config.problem_type = "multi_label_classification"
    with bars_on_terminals_only(), made_for_size(model, pixels.size):
        model.save_pretrained(folder)
    assert isinstance(pixels.transform, Processing), "so are images made for models of transformers"
    pixels.transform.processor.save_pretrained(folder)


def write_heads(adapter: Path, path: Path, places: Mapping[str, str], classes: Sequence[str]) -> None:
    """Writes the trained heads of an adapter's file by themselves, for programs that know neither adapters nor points.

    Args:
        adapter: The adapter's own file, which has them too.
        path: The file to write. Tensors are named as in the model's state; the metadata has `classes`, a list in JSON.
        places: The ids of the heads' points, and where they are in the model.
        classes: What their outputs are called.
    """
    source = Source.of(adapter)
    reader = find_format(source)
    found, _ = reader.read(source, Points([]), reader.reading(strict=False))
    trained = {
        point: tensors for one in found.values() for part in one.parts for point, tensors in part.tensors.items()
    }
    named = {
        f"{place}.{name}": tensor.contiguous()
        for point, place in places.items()
        for name, tensor in trained[point].items()
    }
    write_atomically(path, save(named, {"classes": json.dumps(list(classes))}))
