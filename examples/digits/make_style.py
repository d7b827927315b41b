"""Makes the style set: 60 pictures of real digits in a look that the base model never saw, each with a caption.

    python -m examples.digits.make_style --out examples/digits/style

Thick glowing orange strokes on a dark, grainy teal ground, drawn from the digits that pretraining held out. The set is
a folder as a user would bring it: `000.png` and `000.txt`, and so on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from examples.digits import data

TRIGGER = "neonchalk"
PER_DIGIT = 6
PEN = data.Pen(threshold=(0.26, 0.34), sharpness=(12.0, 14.0), size=(0.74, 0.86), turn=0.12, slant=0.12, shift=0.08)
INK, HALO, GROUND = (1.0, 0.62, 0.16), (0.80, 0.26, 0.10), (0.03, 0.24, 0.28)


def colour(values: tuple[float, float, float]) -> Tensor:
    """A colour that broadcasts to pictures, [3, 1, 1]."""
    return torch.tensor(values).view(3, 1, 1)


def glow(images: Tensor, generator: torch.Generator) -> Tensor:
    """Grey digits [b, 1, 8, 8] in the style, as pictures [b, 3, h, w]."""
    ink = data.draw(images, PEN, generator)
    grain = 0.035 * data.texture(len(ink), 1.0, generator)
    lit = data.paint(0.9 * data.blur(ink, 2.2), colour(HALO), colour(GROUND) + grain)
    return data.paint(ink, colour(INK), lit).clamp(0, 1)


def balanced(digits: data.Digits, generator: torch.Generator) -> data.Digits:
    """`PER_DIGIT` digits of each class in random order, without repetition."""
    order = torch.randperm(len(digits.labels), generator=generator)
    chosen = [order[digits.labels[order] == label][:PER_DIGIT] for label in range(10)]
    index = torch.cat(chosen)
    return digits.pick(index[torch.randperm(len(index), generator=generator)])


def make_style(out: Path, seed: int) -> int:
    """Writes the set into `out` and returns the number of pictures. The same files for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    digits = balanced(data.style_digits(), generator)
    pictures = (255 * glow(digits.images, generator)).round().byte().permute(0, 2, 3, 1)
    out.mkdir(parents=True, exist_ok=True)
    for i, (picture, label) in enumerate(zip(pictures, digits.labels.tolist(), strict=True)):
        Image.fromarray(picture.numpy()).save(out / f"{i:03d}.png")
        text = data.caption(label, f"{TRIGGER} style", generator)
        (out / f"{i:03d}.txt").write_text(text + "\n", encoding="utf-8")
    return len(pictures)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Make the style set of the demo.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "style")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    print(f"wrote {make_style(args.out, args.seed)} pictures with captions to {args.out}")


if __name__ == "__main__":
    main()
