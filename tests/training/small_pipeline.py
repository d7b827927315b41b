"""A small pipeline, one picture, and runs of a few steps on them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from adapterkit.training.run import Run, load_run
from tests.backends.vision_models import pipeline

CAPTION = "one red circle"
ADAPTER = '{type: lora, rank: 4, targets: "linear@component=unet"}'


def write_base(folder: Path) -> Path:
    """A pipeline in `base`, and `data`, which holds one picture; returns the folder."""
    torch.manual_seed(0)
    (folder / "words").mkdir()
    (folder / "data").mkdir()
    pipeline(folder / "words").save_pretrained(folder / "base")
    Image.effect_noise((16, 16), 80).save(folder / "data/a.png")
    (folder / "data/a.txt").write_text(CAPTION)
    return folder


def small_run(folder: Path, output: Path, *overrides: str) -> Run:
    """Of four steps on what `write_base` has written; overrides come last."""
    told = {"task": "diffusion", "model": folder / "base", "data": folder / "data", "output": output}
    values = [*(f"{key}={value}" for key, value in told.items()), f"adapter={ADAPTER}", "steps=4", "learning_rate=0.05"]
    return load_run(None, [*values, "options.sample_steps=2", "options.resolution=16", *overrides])
