"""Examples of captioned pictures whose latents are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkit.training.order import Draw


class Images:
    """Latents of every image, mirrored too where that is asked for, with the seed that decides the rest of an example.

    Args:
        means, spreads: Of the latents' distributions, [images, 1 or 2, channels, height, width].
        captions: Of the images.
        sizes: Original height and width, top and left of what was cut out, its height and width, [images, 6].
        dropout: Probability of an empty caption.
    """

    def __init__(self, means: Tensor, spreads: Tensor, captions: Sequence[str], sizes: Tensor, dropout: float) -> None:
        self.means, self.spreads, self.captions, self.sizes, self.dropout = means, spreads, captions, sizes, dropout

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """What `DiffusionTask.loss` says."""
        generator = draw.generator()
        variant = int(torch.randint(self.means.shape[1], (), generator=generator))
        mean, spread = self.means[draw.index, variant], self.spreads[draw.index, variant]
        latents = mean + spread * torch.randn(mean.shape, generator=generator)
        dropped = float(torch.rand((), generator=generator)) < self.dropout
        return {
            "latents": latents,
            "noise": torch.randn(mean.shape, generator=generator),
            "u": torch.rand((), generator=generator),
            "caption": "" if dropped else self.captions[draw.index],
            "sizes": self.sizes[draw.index],
            "weight": 1.0,
            "prior": False,
        }
