"""The loss on pictures that are not trained on, with noise and times that are always the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from adapterkit.training.diffusion.learning import Batch, Learning
from adapterkit.training.order import Draw, derive_seed
from adapterkit.training.parts import to_device
from adapterkit.training.pictures.dataset import Pictures
from adapterkit.training.pictures.survey import Picture

FIGURE = "validation_loss"
_STILL = {"flip": False, "crops": False, "colour": 0.0, "caption_dropout": 0.0, "tag_dropout": 0.0}
"""What pictures are measured with: as they are, under their whole captions."""


class Validation:
    """Pictures that measure.

    Args:
        data: The pictures.
        times: How many of them each picture is measured at; all are equally far apart, before they are distributed.
        batch_size: Examples in a forward pass.
        collate: Makes batches.
    """

    def __init__(self, data: Pictures, times: int, batch_size: int, collate: Callable[[Sequence[Any]], Batch]) -> None:
        self.data, self.times, self.batch_size, self.collate = data, times, batch_size, collate

    def loss(self, learning: Learning, device: torch.device) -> float:
        """The mean squared error, unweighted; call it in evaluation mode and without gradients."""
        errors = [learning.error(to_device(batch, device)).double().cpu() for batch in self._batches()]
        return float(torch.cat(errors).mean())

    def _batches(self) -> Iterator[Batch]:
        """All examples at all times, those of one size together."""
        groups = self.data.groups
        for _, same in groupby(sorted(range(len(self.data)), key=groups.__getitem__), groups.__getitem__):
            drawn = [(index, time) for index in same for time in range(self.times)]
            for start in range(0, len(drawn), self.batch_size):
                yield self.collate([self._item(*one) for one in drawn[start : start + self.batch_size]])

    def _item(self, index: int, time: int) -> dict[str, Any]:
        item = self.data[Draw(index, derive_seed("validation", index, time))]
        return {**item, "u": torch.tensor((time + 0.5) / self.times)}


def held_out(pictures: Sequence[Picture], fraction: float, seed: int) -> list[Picture]:
    """A share of the pictures that are no priors, at least one and not all; which, their contents decide."""
    chosen = sorted(
        (picture for picture in pictures if not picture.concept.prior),
        key=lambda picture: (derive_seed(seed, "held out", picture.key), str(picture.path)),
    )
    return chosen[: min(max(round(len(chosen) * fraction), 1), len(chosen) - 1)]


def still(picture: Picture) -> Picture:
    """The picture as it is measured: once, as it is, under its whole first caption."""
    found = replace(picture.found, captions=picture.found.captions[:1])
    return replace(picture, found=found, concept=picture.concept.model_copy(update={**_STILL, "repeats": 1}))
