"""The main job on the embedded default: a style learnt from a folder of images, and what came of it.

    python -m examples.digits.demo

Trains through the public command line, then compares base and adapter on the same prompts and seeds: distance to the
style set, digits that a classifier still reads, and that the base under the adapter is bitwise what it was. Last, it
lets diffusers' own loader read the file that the run has made for the UIs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging  # after examples.digits, which makes torchvision importable
from PIL import Image
from transformers.utils import logging as transformers_logging

import adapterkit as ak
from examples.digits.classifier import read_digits
from examples.digits.data import WORDS
from examples.digits.models import load_pipeline
from examples.digits.style_distance import read_folder, style_distance

HERE = Path(__file__).parent
BASE, STYLE, CONFIG = HERE / "base", HERE / "style", HERE.parent / "configs" / "digits-style.yaml"
PROMPT = "a handwritten {word} in neonchalk style"
PER_DIGIT, STEPS, GUIDANCE = 6, 20, 4.0
BAR_STYLE, BAR_READ = 1 / 3, 0.75


def run_training(output: Path) -> float:
    """Trains with the command that the README shows. Returns its seconds."""
    command = ["train", str(CONFIG), f"output={output}", "--overwrite"]
    print("$ adapterkit", *command, flush=True)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "adapterkit", *command], check=True)
    return time.monotonic() - began


def generate(pipe: object, seed: int = 7) -> list[Image.Image]:
    """`PER_DIGIT` pictures of every digit, always from the same noise."""
    pictures: list[Image.Image] = []
    for digit, word in enumerate(WORDS):
        generator = torch.Generator().manual_seed(1000 * seed + digit)
        result = pipe(  # type: ignore[operator]
            [PROMPT.format(word=word)] * PER_DIGIT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generator,
        )
        pictures += result.images
    return pictures


def read_by_diffusers(file: Path) -> list[Image.Image]:
    """What diffusers makes of an exported file, without adapterkit."""
    pipe = load_pipeline(BASE)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return generate(pipe)


def levels_apart(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> int:
    """The largest difference of two sets of pictures, in levels of 255."""
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


def same(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> bool:
    """Whether two sets of pictures are equal in every bit."""
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, second, strict=True))


def read_share(pictures: Sequence[Image.Image]) -> float:
    """Share of the pictures that are read as the digit that their prompt names."""
    wanted = [digit for digit in range(10) for _ in range(PER_DIGIT)]
    return sum(found == digit for found, digit in zip(read_digits(pictures), wanted, strict=True)) / len(wanted)


def losses(output: Path) -> tuple[float, float]:
    """Mean loss of the first and of the last 50 steps."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    values = [line["loss"] for line in lines if "loss" in line]
    return float(np.mean(values[:50])), float(np.mean(values[-50:]))


def main() -> int:
    """Trains, measures, and prints. Returns 0 if every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--skip-training", action="store_true", help="measure the adapter that is there already")
    args = parser.parse_args()
    seconds = 0.0 if args.skip_training else run_training(args.output)
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # its loader warns of each model that a file says nothing of
    transformers_logging.disable_progress_bar()

    pipe = load_pipeline(BASE)
    before = generate(pipe)
    adapters = ak.Adapters(pipe)
    file = args.output / "adapter.safetensors"
    loaded = adapters.load(file, name="style")
    adapters.activate("style")
    after = generate(pipe)
    with adapters.disabled():
        untouched = same(generate(pipe), before)
    adapters.detach()
    untouched = untouched and same(generate(pipe), before)

    fresh = load_pipeline(BASE)
    other = ak.Adapters(fresh)
    other.load(file, name="again")
    other.activate("again")
    reproduced = same(generate(fresh), after)
    other.detach()
    (exported,) = (args.output / "export/kohya").iterdir()
    apart = levels_apart(read_by_diffusers(exported), after)

    reference = read_folder(STYLE)
    far, near = style_distance(before, reference), style_distance(after, reference)
    first, last = losses(args.output)
    read_before, read_after = read_share(before), read_share(after)
    checks = {
        f"style distance {near:.3f}, base {far:.3f}: ratio {near / far:.2f} (bar {BAR_STYLE:.2f})": near
        <= BAR_STYLE * far,
        f"digits read {read_after:.0%}, base {read_before:.0%} (bar {BAR_READ:.0%})": read_after >= BAR_READ,
        "adapter disabled or detached: images bitwise the base's": untouched,
        "adapter in a fresh pipeline: images bitwise the same": reproduced,
        f"exported for UIs, read by diffusers' own loader: images {apart} of 255 levels apart (bar 1)": apart <= 1,
    }
    print()
    for text, passed in checks.items():
        print(f"{'ok  ' if passed else 'FAIL'}  {text}")
    print(
        f"loss: {first:.4f} (first 50 steps) -> {last:.4f} (last 50)"
        + (f", training took {seconds:.0f} s" if seconds else "")
    )
    print(f"adapter: {file}, {file.stat().st_size / 1024:.0f} KiB, {loaded.parameters:,} parameters")
    print(f"for ComfyUI, A1111 and kohya's scripts: {exported}")
    print(f"a model card with samples, and what diffusers makes of the files: {args.output / 'README.md'}")
    print(f"before and after: {args.output / 'samples' / 'grid.png'}, by weight: strengths.png there")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
