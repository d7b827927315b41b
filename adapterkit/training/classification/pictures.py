"""Images by number: read when they are drawn, changed by the draw's seed alone, mixed in their batch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapterkit.training.image_files import open_image
from adapterkit.training.order import Draw, derive_seed

if TYPE_CHECKING:
    from PIL import Image


class Item(NamedTuple):
    """An image [channels, height, width], what the model should say of it [classes], and the draw's seed."""

    image: Tensor
    target: Tensor
    seed: int


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators, which the transforms of timm and torchvision draw from, with a seed; put back after."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


class Pictures:
    """What is trained on.

    Args:
        files: The images.
        targets: [images, classes].
        mode: Pillow's name for the channels that the model takes.
        transform: Makes its input of an image; may draw from the global generators.
    """

    def __init__(
        self, files: Sequence[Path], targets: Tensor, mode: str, transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.files, self.targets, self.mode, self.transform = files, targets, mode, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, draw: Draw) -> Item:
        image = open_image(self.files[draw.index], self.mode)
        with seeded(draw.seed):
            return Item(self.transform(image), self.targets[draw.index], draw.seed)


def collated(
    items: Sequence[Item], mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
) -> tuple[Tensor, Tensor]:
    """Images [images, channels, height, width] and targets [images, classes], mixed by the seeds of the draws."""
    images, targets = (torch.stack(parts) for parts in ([one.image for one in items], [one.target for one in items]))
    if mix is None:
        return images, targets
    with seeded(derive_seed("mix", *(one.seed for one in items))):
        return mix(images, targets)
