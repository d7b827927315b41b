"""Handwritten digits as coloured 32x32 pictures with captions: the data of the embedded diffusion model.

The pictures are scikit-learn's `load_digits` (1797 grey 8x8 images; UCI optical recognition of handwritten digits),
enlarged smoothly to 32x32, moved and turned a little, and drawn in an ink on a ground. The last `STYLE_DIGITS` of them
are held out from all pretraining: the style set is made from those.

Everything random comes from the generator that the caller passes, so a batch is a function of its seed.

Shape legend: b pictures in the batch, 3 colour channels, h = w = `SIDE` pixels. Colours and ink lie in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

SIDE = 32
STYLE_DIGITS = 200
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUBJECTS = (
    "a handwritten {word}",
    "a handwritten {numeral}",
    "handwritten digit {word}",
    "the digit {numeral}",
    "the digit {word}",
    "the number {word}",
    "number {word}",
    "a {word}",
)


@dataclass(frozen=True)
class Look:
    """A plain look that the base model knows by name: one ink colour on one ground colour."""

    words: str
    ink: tuple[float, float, float]
    ground: tuple[float, float, float]


LOOKS = (
    Look("black ink on white paper", (0.06, 0.06, 0.06), (0.97, 0.97, 0.97)),
    Look("blue ink on white paper", (0.10, 0.20, 0.62), (0.97, 0.97, 0.97)),
    Look("grey pencil on cream paper", (0.42, 0.42, 0.42), (0.96, 0.92, 0.80)),
)


@dataclass(frozen=True)
class Pen:
    """How digits are drawn: ranges from which each picture draws its values uniformly.

    Attributes:
        threshold: Grey level at which a stroke begins; lower is thicker.
        sharpness: Slope of the stroke's edge, per unit of grey level.
        size: Height of the digit as a fraction of the picture.
        turn: Largest rotation either way, in radians.
        slant: Largest shear either way, pixels per pixel.
        shift: Largest displacement either way, as a fraction of half the picture.
    """

    threshold: tuple[float, float] = (0.32, 0.55)
    sharpness: tuple[float, float] = (10.0, 14.0)
    size: tuple[float, float] = (0.74, 0.9)
    turn: float = 0.16
    slant: float = 0.15
    shift: float = 0.1


@dataclass(frozen=True)
class Digits:
    """Grey digits `images` [n, 1, 8, 8] in [0, 1] and their `labels` [n] in 0..9."""

    images: Tensor
    labels: Tensor

    def pick(self, index: Tensor) -> Digits:
        """The digits at `index`, in that order."""
        return Digits(self.images[index], self.labels[index])

    def sample(self, count: int, generator: torch.Generator) -> Digits:
        """`count` digits drawn with replacement."""
        return self.pick(torch.randint(len(self.labels), (count,), generator=generator))


def all_digits() -> Digits:
    """All 1797 digits in scikit-learn's order."""
    raw = load_digits()
    images = torch.as_tensor(raw.images, dtype=torch.float32)[:, None] / 16
    return Digits(images, torch.as_tensor(raw.target, dtype=torch.long))


def base_digits() -> Digits:
    """The digits that pretraining may see."""
    digits = all_digits()
    return digits.pick(torch.arange(len(digits.labels) - STYLE_DIGITS))


def style_digits() -> Digits:
    """The held-out digits, from which the style set is made."""
    digits = all_digits()
    return digits.pick(torch.arange(len(digits.labels) - STYLE_DIGITS, len(digits.labels)))


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """`count` numbers drawn uniformly from [low, high)."""
    return low + (high - low) * torch.rand(count, generator=generator)


def draw(images: Tensor, pen: Pen, generator: torch.Generator) -> Tensor:
    """Ink coverage [b, 1, h, w] of grey digits [b, 1, 8, 8], each moved, turned and thickened at random."""
    b = len(images)
    turn, slant = uniform(b, -pen.turn, pen.turn, generator), uniform(b, -pen.slant, pen.slant, generator)
    scale = 1 / uniform(b, *pen.size, generator)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    shift = [uniform(b, -pen.shift, pen.shift, generator) for _ in range(2)]
    rows = torch.stack([cos, slant - sin, shift[0], sin, cos, shift[1]], dim=1)
    grid = F.affine_grid(rows.view(b, 2, 3), [b, 1, SIDE, SIDE], align_corners=False)
    grey = F.grid_sample(images, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    threshold = uniform(b, *pen.threshold, generator).view(b, 1, 1, 1)
    sharpness = uniform(b, *pen.sharpness, generator).view(b, 1, 1, 1)
    return torch.sigmoid(sharpness * (grey - threshold))


def paint(ink: Tensor, colour: Tensor, ground: Tensor) -> Tensor:
    """Picture [b, 3, h, w] of `ink` coverage [b, 1, h, w] in `colour` over `ground`, each broadcastable to it."""
    return ground + ink * (colour - ground)


def blur(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [b, c, h, w] with standard deviation `sigma` in pixels; edges are mirrored."""
    reach = math.ceil(2.5 * sigma)
    axis = torch.arange(-reach, reach + 1, dtype=picture.dtype)
    kernel = torch.softmax(-(axis**2) / (2 * sigma**2), dim=0)
    c = picture.shape[1]
    padded = F.pad(picture, [reach] * 4, mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)
    return F.conv2d(rows, kernel.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)


def texture(count: int, sigma: float, generator: torch.Generator) -> Tensor:
    """Smooth noise [count, 1, h, w] with mean 0 and standard deviation 1; `sigma` is its grain in pixels."""
    noise = blur(torch.randn(count, 1, SIDE, SIDE, generator=generator), sigma)
    return (noise - noise.mean((2, 3), keepdim=True)) / noise.std((2, 3), keepdim=True)


def caption(label: int, look: str | None, generator: torch.Generator) -> str:
    """A caption that names the digit in one of several ways and then, if given, the look."""
    subject = SUBJECTS[int(torch.randint(len(SUBJECTS), (1,), generator=generator))]
    subject = subject.format(word=WORDS[label], numeral=label)
    return f"{subject} in {look}" if look else subject


def caption_batch(count: int, generator: torch.Generator) -> tuple[list[str], Tensor, Tensor]:
    """`count` captions, the digit that each names and the look; what is not named has the number past the last.

    Some name an unknown word as their look: so the text encoder learns to pass over words that say nothing to it, and
    finds the digit in a prompt that also holds a trigger word.
    """
    digits = torch.randint(11, (count,), generator=generator)
    looks = torch.randint(len(LOOKS) + 2, (count,), generator=generator)
    captions = []
    for digit, look in zip(digits.tolist(), looks.tolist(), strict=True):
        words = [*(known.words for known in LOOKS), None, f"{unknown_word(generator)} style"][look]
        captions.append("" if digit == 10 else caption(digit, words, generator))
    nameless = (digits == 10) | (looks > len(LOOKS))
    return captions, digits, torch.where(nameless, len(LOOKS), looks)


def caption_words() -> set[str]:
    """Every word that a caption can hold, numerals and unknown words aside."""
    phrases = [*WORDS, *SUBJECTS, *(look.words for look in LOOKS), "in style"]
    return {word for phrase in phrases for word in phrase.split() if word.isalpha()}


def unknown_word(generator: torch.Generator) -> str:
    """A word of 4 to 10 random letters."""
    length = int(torch.randint(4, 11, (1,), generator=generator))
    return "".join(chr(97 + int(i)) for i in torch.randint(26, (length,), generator=generator))


def plain_batch(digits: Digits, count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """`count` pictures [b, 3, h, w] in the plain looks, and captions.

    Half of the captions name the look, one in ten names an unknown word in its place, and one in ten is empty.
    """
    chosen = digits.sample(count, generator)
    looks = [LOOKS[i] for i in torch.randint(len(LOOKS), (count,), generator=generator).tolist()]
    colour = jittered([look.ink for look in looks], generator)
    ground = jittered([look.ground for look in looks], generator)
    pictures = paint(draw(chosen.images, Pen(), generator), colour, ground).clamp(0, 1)
    captions = []
    for label, look in zip(chosen.labels.tolist(), looks, strict=True):
        fate = float(torch.rand(1, generator=generator))
        words = look.words if fate < 0.5 else f"{unknown_word(generator)} style" if fate < 0.6 else None
        captions.append("" if fate > 0.9 else caption(label, words, generator))
    return pictures, captions


def jittered(colours: Sequence[tuple[float, float, float]], generator: torch.Generator) -> Tensor:
    """Colours as [b, 3, 1, 1], each channel moved by a few per cent."""
    exact = torch.tensor(colours)
    return (exact + 0.012 * torch.randn(exact.shape, generator=generator))[..., None, None]


def varied_batch(digits: Digits, count: int, generator: torch.Generator) -> Tensor:
    """`count` pictures [b, 3, h, w] in any ink on any textured ground, some with a halo: what the autoencoder learns.

    The autoencoder must represent looks that the diffusion model never sees, or no adapter could reach them.
    """
    pen = Pen(threshold=(0.12, 0.65), sharpness=(6.0, 20.0), size=(0.7, 1.0), turn=0.3, slant=0.25, shift=0.15)
    ink = draw(digits.sample(count, generator).images, pen, generator)
    # Past the ends and cut, so that the corners of the colour cube (paper white, say) come up often.
    ground, halo, colour = (1.3 * torch.rand(3, count, 3, 1, 1, generator=generator) - 0.15).clamp(0, 1)
    grain, reach = uniform(2, 0.9, 2.5, generator).tolist()
    rough = uniform(count, 0.0, 0.08, generator) * (torch.rand(count, generator=generator) < 0.6)
    ground = ground + rough.view(-1, 1, 1, 1) * texture(count, grain, generator)
    glow = (torch.rand(count, generator=generator) < 0.5).view(-1, 1, 1, 1) * blur(ink, reach)
    return paint(ink, colour, paint(glow, halo, ground)).clamp(0, 1)
