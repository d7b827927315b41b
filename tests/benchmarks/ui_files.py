"""Files for the UIs at true size: LoRA of rank 16 on every layer that kohya's scripts train. The floor is one read.

The bases have the shapes of the real ones, and memory that nobody has written: nothing is computed with them.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.formats.foreign_names import ForeignNames
from adapterkit.formats.kohya import KohyaFormat
from adapterkit.formats.modules import Modules
from adapterkit.formats.pipeline_parts import part_of
from adapterkit.formats.registry import named_format
from adapterkit.formats.source import Source
from adapterkit.handle.view import seen
from adapterkit.mapping.model import map_model
from adapterkit.points import Points, WeightPoint
from tests.benchmarks.measure import Side, Timing, measure
from tests.formats import true_size

_RANK = 16


def sd15(rounds: int) -> Mapping[str, Timing]:
    """Stable Diffusion 1.5 and its text encoder: load, and save as kohya's scripts would."""
    return _loading("sd15", rounds)


def sdxl(rounds: int) -> Mapping[str, Timing]:
    """Stable Diffusion XL and both text encoders: load, and save as kohya's scripts would."""
    return _loading("sdxl", rounds)


def flux(rounds: int) -> Mapping[str, Timing]:
    """Flux with CLIP and T5: what the file says at every point; a base of 24 GB to put it on is left out."""
    points = seen(map_model(true_size.pipeline("flux")))
    kohya = named_format("kohya")
    with tempfile.TemporaryDirectory() as folder:
        file = _written(points, Path(folder))
        found, _ = kohya.read(Source.of(file), points)
        sides = {
            "floor": Side(lambda _: file.read_bytes()),
            "adapterkit read": Side(lambda _: kohya.read(Source.of(file), points)),
            "adapterkit write": Side(lambda _: kohya.write(found, file.with_name("out.safetensors"), points)),
        }
        return measure(sides, rounds, warmup=1)


def _loading(name: str, rounds: int) -> Mapping[str, Timing]:
    pipe = true_size.pipeline(name)
    for model in pipe.components.values():
        model.requires_grad_(False).eval().half().to_empty(device="cpu")
    adapters = ak.Adapters(pipe)
    with tempfile.TemporaryDirectory() as folder:
        file = _written(seen(map_model(pipe)), Path(folder))
        adapters.load(file, "b")
        out = Path(folder) / "out.safetensors"
        sides = {
            "floor": Side(lambda _: file.read_bytes()),
            "adapterkit load": Side(lambda _: adapters.load(file, "a"), after=lambda _: adapters.remove("a")),
            "adapterkit save": Side(lambda _: adapters.save("b", out, format="kohya")),
            "adapterkit save native": Side(lambda _: adapters.save("b", out)),
        }
        return measure(sides, rounds, warmup=1)


def _written(points: Points, folder: Path) -> Path:
    """A file with every linear layer of blocks, by the scripts' names, float16."""
    from safetensors.torch import save_file

    assert points.model is not None
    components, modules, called = points.model.components, Modules(points), KohyaFormat().names(points)
    tensors: dict[str, Tensor] = {}
    for component in components.values():
        naming = called(component, part_of(component, components))
        for foreign, pieces in ForeignNames(component).written("kohya"):
            places = modules.placed(component.name, pieces)
            shape = places[0].shape if places else ()
            if len(shape) < 2 or any(size > 1 for size in shape[2:]) or not re.search("block|layers", foreign):
                continue
            if any(isinstance(place.point, WeightPoint) and place.point.form == "embedding" for place in places or ()):
                continue
            name, ones = naming(foreign), [1] * (len(shape) - 2)
            tensors[f"{name}.lora_down.weight"] = torch.randn(_RANK, shape[1], *ones).half()
            tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], _RANK, *ones).half()
            tensors[f"{name}.alpha"] = torch.tensor(8.0)
    path = folder / "file.safetensors"
    save_file(tensors, str(path))
    return path
