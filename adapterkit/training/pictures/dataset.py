"""Examples: latents of a look of a picture, noise, a place in time, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterkit.training.order import Draw
from adapterkit.training.pictures.latents import Latents, Shot
from adapterkit.training.pictures.survey import Picture


@dataclass(frozen=True)
class Example:
    """A picture with its looks, all of one size."""

    picture: Picture
    shots: Sequence[Shot]


class Pictures:
    """Every picture as often as it is repeated. Batches are of one size.

    Args:
        examples: The pictures.
        latents: Of all their shots.
        unmasked: The weight of what masks leave out.
    """

    def __init__(self, examples: Sequence[Example], latents: Latents, unmasked: float = 0.0) -> None:
        self.examples = [example for example in examples for _ in range(example.picture.repeats)]
        sizes = sorted({example.shots[0].look.frame.size for example in examples})
        self.groups = [sizes.index(example.shots[0].look.frame.size) for example in self.examples]
        self.masked = any(example.picture.mask is not None for example in examples)
        self.latents, self.unmasked = latents, unmasked

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """What one draw shows.

        Returns:
            `latents` and `noise` [channels, ..., height, width]; `u`, uniform in [0, 1); `caption`; `sizes` [6], see
            `Frame.conditioning`; `weight` of the loss; `prior`, whether it shows what is not to be lost; `mask`
            [1, height, width], weights of the parts, where any picture has a mask; and, where holes are painted anew,
            `hole` and `surroundings`, latents of the rest.
        """
        generator = draw.generator()
        example = self.examples[draw.index]
        shot = example.shots[int(torch.randint(len(example.shots), (), generator=generator))]
        concept, entry = example.picture.concept, self.latents.get(shot)
        mean, spread = entry["mean"], entry["spread"]
        item = {
            "latents": mean + spread * torch.randn(mean.shape, generator=generator),
            "caption": concept.wording.said(_drawn(example.picture.found.captions, generator), generator),
            "noise": torch.randn(mean.shape, generator=generator),
            "u": torch.rand((), generator=generator),
            "sizes": torch.tensor(shot.look.conditioning),
            "weight": torch.tensor(concept.weight),
            "prior": concept.prior,
        }
        if "hole" in entry:
            around, spread = entry["around_mean"], entry["around_spread"]
            surroundings = around + spread * torch.randn(around.shape, generator=generator)
            item |= {"hole": entry["hole"], "surroundings": surroundings}
        if not self.masked:
            return item
        mask = entry.get("mask", torch.ones(1, *mean.shape[-2:]))
        return {**item, "mask": self.unmasked + (1 - self.unmasked) * mask}


def _drawn(captions: Sequence[str], generator: torch.Generator) -> str:
    """One of them; where there is one, no random number is drawn."""
    return captions[int(torch.randint(len(captions), (), generator=generator)) if len(captions) > 1 else 0]
