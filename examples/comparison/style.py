"""Digits' style: a small Stable Diffusion learns to draw in a look that it never saw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import adapterkit as ak
from adapterkit.training.result import Result
from examples.comparison.job import Job
from examples.comparison.methods import Places
from examples.digits import data
from examples.digits.classifier import read_digits
from examples.digits.evaluate import generate
from examples.digits.make_style import TRIGGER, balanced, glow
from examples.digits.models import load_pipeline
from examples.digits.style_distance import read_folder, style_distance

_DIGITS = Path(__file__).parents[1] / "digits"
_EACH, _STEPS, _GUIDANCE = 5, 12, 3.0
_FIRST_SEED = 1000


def _unseen() -> data.Digits:
    """The held-out digits that are not among the 60 of the style set."""
    digits = data.style_digits()
    seen = balanced(digits, torch.Generator().manual_seed(11))  # as `make_style` chose them
    apart = torch.cdist(digits.images.flatten(1), seen.images.flatten(1)).min(1).values > 0
    return digits.pick(apart.nonzero().flatten())


class Style(Job):
    """The pipeline and the pictures of `examples/digits`."""

    name = "style"
    title = "digits' style: a Stable Diffusion learns a look from 60 pictures"
    figure = "loss"
    larger_is_better = False
    places = Places("{attn,cross,mlp,proj,res}.*", "attn cross mlp", "attn.kv cross.kv", "@component=unet")
    usual_steps = 200

    def make(self) -> None:
        """Pictures in the look, of other digits, that drawn ones are held against."""
        digits = _unseen()
        half = len(digits.labels) // 2
        for number, split in enumerate(("validation", "test")):
            part = digits.pick(torch.arange(number * half, (number + 1) * half))
            pictures = glow(part.images, torch.Generator().manual_seed(number))
            folder = self.folder / split
            folder.mkdir(parents=True, exist_ok=True)
            for i, picture in enumerate((255 * pictures).round().byte().permute(0, 2, 3, 1)):
                Image.fromarray(picture.numpy()).save(folder / f"{i:03d}.png")
                text = f"a handwritten {data.WORDS[part.labels[i]]} in {TRIGGER} style"
                (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")

    def values(self, split: str) -> Mapping[str, Any]:
        """See `Job.values`."""
        return {
            "task": "diffusion",
            "model": str(_DIGITS / "base"),
            "data": str(_DIGITS / "style"),
            "batch_size": 12,
            "options": {"caption_dropout": 0.1, "validation_data": str(self.folder / split)},
        }

    def measure(self, result: Result, split: str) -> Mapping[str, float]:
        """The loss on pictures of other digits, at fixed noise and times.

        With the test part also how far drawn pictures are from the look, and how many show the digit asked for.
        """
        loss = {"loss": result.figures["validation_loss"], "base": result.figures["base validation_loss"]}
        return {**loss, **(self._drawn(result.adapter) if split == "test" else {})}

    def _drawn(self, adapter: Path | None) -> dict[str, float]:
        file = self.folder / "base.json"
        if not file.exists():
            file.write_text(json.dumps(self._measured(None)), encoding="utf-8")
        alone = json.loads(file.read_text(encoding="utf-8"))
        return {**self._measured(adapter), **{f"base {name}": value for name, value in alone.items()}}

    def _measured(self, adapter: Path | None) -> dict[str, float]:
        pipeline = load_pipeline(_DIGITS / "base")
        if adapter is not None:
            adapters = ak.Adapters(pipeline)
            adapters.load(adapter, "style")
            adapters.activate("style")
        asked = [digit for digit in range(10) for _ in range(_EACH)]
        prompts = [f"a handwritten {data.WORDS[digit]} in {TRIGGER} style" for digit in asked]
        drawn = generate(pipeline, prompts, _FIRST_SEED, _STEPS, _GUIDANCE, batch=25)
        right = [found == digit for found, digit in zip(read_digits(drawn), asked, strict=True)]
        distance = style_distance(drawn, read_folder(self.folder / "test"))
        return {"style distance": distance, "digits read": sum(right) / len(right)}
