"""How far the look of some pictures is from the look of a reference set, as one number.

A picture is reduced to `FEATURES`: what colour its ground and its ink are, how rough the ground is, how much ink there
is, how wide the strokes and how soft their edges are. What the digit is does not enter. A set of pictures is the mean
and the standard deviation of each feature; the distance between two sets is the 2-Wasserstein distance between normal
distributions with those, features independent and each in units of its `SCALES` (Dowson & Landau 1982, diagonal case):

    d = sqrt( mean over features of ((m - m')^2 + (s - s')^2) / scale^2 )

It is 0 for equal sets, small for two halves of one set, and around 1 where features are off by their scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from examples.digits.classifier import as_tensor, principal_ink

FEATURES = (
    "ground red", "ground green", "ground blue", "ink red", "ink green", "ink blue",
    "ground roughness", "ink coverage", "stroke width", "edge softness",
)  # fmt: skip
SCALES = (0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.05, 0.1, 2.0, 0.1)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of `values` [b, c, h, w] over pixels with `weights` [b, 1, h, w], as [b, c]."""
    return (values * weights).sum((2, 3)) / weights.sum((2, 3)).clamp_min(1e-6)


def features(pictures: Tensor) -> Tensor:
    """The `FEATURES` of pictures [b, 3, h, w] in [0, 1], as [b, 10].

    Colours are in [0, 1]; roughness is the ground's standard deviation; coverage is the mean of the ink; width is
    twice the inked area over the length of its outline, in pixels; softness is the fraction of half-inked pixels.
    """
    ink = principal_ink(pictures)
    on_ground, on_stroke = (ink < 0.25).float(), (ink > 0.75).float()
    ground, colour = weighted_mean(pictures, on_ground), weighted_mean(pictures, on_stroke)
    spread = weighted_mean((pictures - ground[..., None, None]) ** 2, on_ground).mean(1, keepdim=True).sqrt()
    down, across = ink.diff(dim=2)[:, :, :, :-1], ink.diff(dim=3)[:, :, :-1, :]
    outline = (down**2 + across**2).sqrt().sum((2, 3))
    width = 2 * ink.sum((2, 3)) / outline.clamp_min(1e-6)
    soft = 1 - on_ground.mean((2, 3)) - on_stroke.mean((2, 3))
    return torch.cat([ground, colour, spread, ink.mean((2, 3)), width, soft], dim=1)


def style_distance(images: Sequence[Image.Image], reference: Sequence[Image.Image]) -> float:
    """Distance between the looks of two sets of pictures; the module's documentation has the equation.

    Args:
        images: PIL images, two or more.
        reference: The set whose look is wanted, two or more.

    Returns:
        A number from 0 upward without a unit. Symmetric in its arguments.

    Raises:
        ValueError: One of the sets has fewer than two pictures.
    """
    for name, pictures in {"images": images, "reference": reference}.items():
        if len(pictures) < 2:
            raise ValueError(f"{name} has {len(pictures)} pictures: a spread needs at least 2")
    found, wanted = features(as_tensor(images)), features(as_tensor(reference))
    scales = torch.tensor(SCALES)
    mean = (found.mean(0) - wanted.mean(0)) / scales
    spread = (found.std(0) - wanted.std(0)) / scales
    return float((mean**2 + spread**2).mean().sqrt())


def read_folder(folder: str | Path) -> list[Image.Image]:
    """Every PNG file of a folder as an image, in order of name.

    Raises:
        FileNotFoundError: The folder holds no PNG file.
    """
    files = sorted(Path(folder).glob("*.png"))
    if not files:
        raise FileNotFoundError(f"no PNG files in {folder}: python -m examples.digits.make_style makes the set")
    return [Image.open(file).convert("RGB") for file in files]
