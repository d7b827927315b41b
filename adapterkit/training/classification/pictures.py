"""Images by number: read when they are drawn, changed by the draw's seed alone, mixed in their batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adapterkit.training.classification.targets import Targets
from adapterkit.training.image_files import open_image
from adapterkit.training.order import Draw, derive_seed, seeded

if TYPE_CHECKING:
    from PIL import Image


class Item(NamedTuple):
    """An image [channels, height, width], what the model should say of it [classes], and the draw's seed."""

    image: Tensor
    target: Tensor
    seed: int


class Pictures:
    """What is trained on.

    Args:
        files: The images.
        targets: Of each [classes].
        mode: Pillow's name for the channels that the model takes.
        transform: Makes its input of an image; may draw from the global generators.
    """

    def __init__(
        self, files: Sequence[Path], targets: Targets | Tensor, mode: str, transform: Callable[[Image.Image], Tensor]
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
