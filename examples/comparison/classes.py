"""Digits' classes: a small vision transformer that has learnt 0 to 4 is to read 5 to 9."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from adapterkit.training.result import Result
from examples.comparison.job import Job
from examples.vision_digits import CLASSES, Images, digits, pretrained

_SHAPE = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
_PARTS = {"train": slice(0, 200), "validation": slice(200, 400), "test": slice(400, None)}


class Classes(Job):
    """The model and the images of `examples/vision_digits.py`, as files."""

    name = "classes"
    title = "digits' classes: a vision transformer goes from 0-4 to 5-9 (200 images)"
    figure = "accuracy"
    new_head = True
    usual_steps = 120

    def make(self) -> None:
        """The base in a folder as timm reads it, and a folder of PNG files for each part and class."""
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=CLASSES, **_SHAPE)
        model.load_state_dict(pretrained().state_dict())
        look = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
        save_for_hf(model, str(self.folder / "base"), {"model_args": _SHAPE}, safe_serialization=True, data_config=look)
        images = digits(5)
        for part, rows in _PARTS.items():
            self._write(part, images[rows])

    def _write(self, part: str, images: Images) -> None:
        pixels = ((images.pixels + 1) * 127.5).round().to(torch.uint8)
        for number, (picture, label) in enumerate(zip(pixels, images.labels.tolist(), strict=True)):
            folder = self.folder / part / str(5 + label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[0].numpy()).save(folder / f"{number:03d}.png")

    def values(self, split: str) -> Mapping[str, Any]:
        """See `Job.values`."""
        options = {"train_head": True, "validation": str(self.folder / split), "crop_scale": [0.8, 1.0]}
        return {
            "task": "image-classification",
            "model": str(self.folder / "base"),
            "data": str(self.folder / "train"),
            "batch_size": 40,
            "options": options,
        }

    def measure(self, result: Result, split: str) -> Mapping[str, float]:
        """Share of the images that are read; that of the base is of a head that has learnt nothing."""
        return {"accuracy": result.figures["accuracy"], "base": result.figures["base accuracy"]}
