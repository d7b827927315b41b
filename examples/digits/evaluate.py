"""Measures the embedded pipeline: are the digits that it draws the digits that the prompts name?

    python -m examples.digits.evaluate --base examples/digits/base

Draws 20 pictures of each digit, lets the classifier of real digits read them, and writes `QUALITY.md` and a sheet of
samples beside the model. With the style set at hand it also gives the base's distance from it, which an adapter has to
bring down.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from examples.digits import data, models
from examples.digits.classifier import TEST_DIGITS, accuracy, read_digits, split
from examples.digits.style_distance import read_folder, style_distance

HERE = Path(__file__).parent
PER_DIGIT = 20
STEPS, GUIDANCE = 20, 3.0


@dataclass(frozen=True)
class Reading:
    """What the classifier read: `wanted` and `found` digits, one of each per picture."""

    wanted: list[int]
    found: list[int]

    def accuracy(self, digit: int | None = None) -> float:
        """Fraction read as wanted, of all pictures or of those of one digit."""
        pairs = [(w, f) for w, f in zip(self.wanted, self.found, strict=True) if digit in (None, w)]
        return sum(w == f for w, f in pairs) / len(pairs)


def prompts(suffix: str | None = None) -> tuple[list[str], list[int]]:
    """`PER_DIGIT` captions for each digit and the digits, going round the ways to say it and the looks.

    Args:
        suffix: What to say in place of a plain look, such as "in neonchalk style".
    """
    captions, digits = [], []
    for digit, word in enumerate(data.WORDS):
        for i in range(PER_DIGIT):
            subject = data.SUBJECTS[i % len(data.SUBJECTS)].format(word=word, numeral=digit)
            captions.append(f"{subject} {suffix or 'in ' + data.LOOKS[i % len(data.LOOKS)].words}")
            digits.append(digit)
    return captions, digits


def generate(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 20,
) -> list[Image.Image]:
    """One picture per caption; picture i comes from the seed `seed + i`, whatever the batch size.

    Args:
        pipeline: The pipeline, adapted or not.
        captions: The prompts.
        seed: Seed of the first picture.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        batch: Pictures drawn at once.
    """
    images: list[Image.Image] = []
    for start in range(0, len(captions), batch):
        chosen = list(captions[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chosen))]
        output = pipeline(chosen, num_inference_steps=steps, guidance_scale=guidance, generator=generators)
        images += output.images
    return images


def sheet(images: Sequence[Image.Image], columns: int, zoom: int = 2) -> Image.Image:
    """All images, of one size, side by side in rows of `columns`."""
    wide, high = (zoom * side for side in images[0].size)
    paper = Image.new("RGB", (columns * wide, -(-len(images) // columns) * high), "white")
    for i, image in enumerate(images):
        paper.paste(image.resize((wide, high), Image.Resampling.NEAREST), (i % columns * wide, i // columns * high))
    return paper


def quality(base: Path, style: Path, seed: int) -> tuple[str, list[Image.Image]]:
    """The report in Markdown, and the pictures it is about."""
    pipeline = models.load_pipeline(base)
    captions, wanted = prompts()
    started = time.perf_counter()
    images = generate(pipeline, captions, seed)
    seconds = time.perf_counter() - started
    reading = Reading(wanted, read_digits(images))
    by_digit = ", ".join(f"{digit}: {reading.accuracy(digit):.0%}" for digit in range(10))
    size = sum(file.stat().st_size for file in base.rglob("*.safetensors")) / 1e6
    rows = {
        "generated digits read as the prompt names them": f"{reading.accuracy():.1%} of {len(images)}",
        "the same by digit": by_digit,
        "classifier on real digits it has not seen": f"{accuracy(split()[1], painted=False):.1%} of {TEST_DIGITS}",
        "drawn with": f"seed {seed}, {STEPS} steps, guidance {GUIDANCE}, {seconds:.0f} s in all",
        "weights in half precision": f"{size:.1f} MB",
    }
    if style.is_dir():
        wanted_look = read_folder(style)
        rows["style distance of these pictures from the style set"] = f"{style_distance(images, wanted_look):.3f}"
        halves = style_distance(wanted_look[::2], wanted_look[1::2])
        rows["style distance between halves of the style set"] = f"{halves:.3f}"
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["# Measured quality", "", "Written by `python -m examples.digits.evaluate`.", "",
                      "| what | measured |", "|---|---|", *lines, ""]), images  # fmt: skip


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure the embedded digits pipeline.")
    parser.add_argument("--base", type=Path, default=HERE / "base", help="folder of the pipeline")
    parser.add_argument("--style", type=Path, default=HERE / "style", help="folder of the style set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report, images = quality(args.base, args.style, args.seed)
    (args.base / "QUALITY.md").write_text(report, encoding="utf-8")
    sheet(images, columns=PER_DIGIT).save(args.base / "samples.png")
    print(report)


if __name__ == "__main__":
    main()
