"""A classifier that reads the digit in a picture, whatever its ink and ground.

    python -m examples.digits.classifier        # trains it and prints its accuracy on held-out real digits

It never sees colours: a picture is first reduced to ink coverage, in which ink is light and ground is dark. It learns
from scikit-learn's real digits alone, never from generated ones, in under a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from examples.digits import data

TEST_DIGITS = 360
STEPS, BATCH, SEED = 300, 96, 3
PEN = data.Pen(threshold=(0.15, 0.6), sharpness=(6.0, 16.0), size=(0.7, 1.0), turn=0.22, slant=0.2, shift=0.15)


def as_tensor(images: Sequence[Image]) -> Tensor:
    """Pictures of any mode and size as [b, 3, 32, 32] in [0, 1].

    Args:
        images: One PIL image or more.

    Raises:
        ValueError: There is no image.
    """
    if not images:
        raise ValueError("no images to read: expected one or more PIL images, got an empty sequence")
    small = [image.convert("RGB").resize((data.SIDE, data.SIDE)) for image in images]
    return torch.stack([torch.from_numpy(np.array(image)) for image in small]).permute(0, 3, 1, 2).float() / 255


def principal_ink(pictures: Tensor) -> Tensor:
    """Ink coverage [b, 1, h, w] in [0, 1] of pictures [b, 3, h, w] in any two colours.

    Pixels are projected on the first principal axis of the picture's colours. The sign is chosen such that the border
    is ground, and the range such that the 5th percentile is 0 and the 98th is 1.
    """
    b, _, h, w = pictures.shape
    colours = pictures.flatten(2)
    centred = colours - colours.mean(2, keepdim=True)
    axes = torch.linalg.eigh(centred @ centred.mT).eigenvectors
    level = (axes[:, :, -1:].mT @ centred).view(b, h, w)
    frame = torch.ones(h, w, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    inverted = level[:, frame].median(1).values > level[:, ~frame].mean(1)
    level = torch.where(inverted.view(b, 1, 1), -level, level).flatten(1)
    low, high = level.quantile(0.05, 1, keepdim=True), level.quantile(0.98, 1, keepdim=True)
    return ((level - low) / (high - low).clamp_min(1e-3)).clamp(0, 1).view(b, 1, h, w)


class DigitReader(nn.Module):
    """A small convolutional network from ink coverage [b, 1, 32, 32] to logits [b, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.AvgPool2d(2), *self._block(1, 16), *self._block(16, 48),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(48 * 4 * 4, 10),
        )  # fmt: skip

    @staticmethod
    def _block(wide_in: int, wide_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(wide_in, wide_out, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(wide_out), nn.ReLU(), nn.MaxPool2d(2)]

    def forward(self, ink: Tensor) -> Tensor:
        """Logits of the ten digits."""
        return self.layers(ink)


def split() -> tuple[data.Digits, data.Digits]:
    """Training digits, and `TEST_DIGITS` held-out ones drawn at random from all 1797."""
    digits = data.all_digits()
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(SEED))
    return digits.pick(order[TEST_DIGITS:]), digits.pick(order[:TEST_DIGITS])


@torch.enable_grad()
def train() -> DigitReader:
    """Trains a reader on the training digits, drawn anew in each step. The same reader each time."""
    generator = torch.Generator().manual_seed(SEED)
    digits, _ = split()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        reader = DigitReader()
        optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS)
        for _ in range(STEPS):
            chosen = digits.sample(BATCH, generator)
            loss = F.cross_entropy(reader(noisy_ink(chosen.images, generator)), chosen.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return reader.eval()


def noisy_ink(images: Tensor, generator: torch.Generator) -> Tensor:
    """Ink coverage as `principal_ink` finds it in a picture: rescaled, with a little noise of the ground."""
    ink = data.draw(images, PEN, generator)
    rough = data.uniform(len(ink), 0.0, 0.1, generator).view(-1, 1, 1, 1)
    return principal_ink(ink + rough * torch.randn(ink.shape, generator=generator))


@lru_cache(maxsize=1)
def reader() -> DigitReader:
    """The trained reader; it is trained once per process."""
    return train()


@torch.no_grad()
def read_digits(images: Sequence[Image]) -> list[int]:
    """The digit in each picture.

    Args:
        images: PIL images of one digit each, in any ink on any ground, of any size.

    Returns:
        One number in 0..9 per picture. The first call in a process trains the classifier (seconds).
    """
    return reader()(principal_ink(as_tensor(images))).argmax(1).tolist()


def accuracy(digits: data.Digits, painted: bool = True) -> float:
    """Fraction of `digits` read correctly, each drawn once upright; in random colours if `painted`, else in black."""
    generator = torch.Generator().manual_seed(0)
    ink = data.draw(digits.images, data.Pen(turn=0.0, slant=0.0, shift=0.0), generator)
    colour, ground = torch.rand(2, len(ink), 3, 1, 1, generator=generator) if painted else torch.tensor([0.0, 1.0])
    with torch.no_grad():
        found = reader()(principal_ink(data.paint(ink, colour, ground).expand(-1, 3, -1, -1))).argmax(1)
    return float((found == digits.labels).float().mean())


def main() -> None:
    """Prints the accuracy on the held-out digits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    _, test = split()
    print(f"held-out accuracy on {TEST_DIGITS} real digits: black on white {accuracy(test, painted=False):.1%}, "
          f"in random colours {accuracy(test):.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
