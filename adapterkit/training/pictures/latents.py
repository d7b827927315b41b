"""Latents of pictures, computed once for each look, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkit.errors import DataError
from adapterkit.training.image_files import open_image
from adapterkit.training.pictures.looks import Look
from adapterkit.training.pictures.store import Store, Tensors, key_of, make
from adapterkit.training.pictures.survey import Picture

_VERSION = 1  # of what an entry holds
_MUCH = 1 << 30  # bytes in memory, of which people should know
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pictures [n, 3, height, width], 0 to 1, to means and deviations of latents [n, channels, ..., height, width]."""


@dataclass(frozen=True)
class Shot:
    """One look of one picture."""

    picture: Picture
    look: Look

    def key(self, model: str) -> str:
        """What its latents follow from."""
        mask = self.picture.mask
        return key_of(_VERSION, model, self.picture.key, self.look, mask and (mask.key, mask.opacity))

    def mask(self) -> Tensor | None:
        """Its mask as it is looked at, [1, height, width], where the picture has one."""
        return None if self.picture.mask is None else self.look.of_mask(self.picture.mask.read())


class Latents:
    """What a model makes of shots.

    Args:
        store: Keeps them.
        model: Says which model encodes, see `identity_of`.
        holes: Whether what a mask marks is to be painted anew, so that its surroundings are encoded too.
    """

    def __init__(self, store: Store, model: str, holes: bool = False) -> None:
        self.store, self.model, self.holes = store, f"{model} holes" if holes else model, holes

    def prepare(self, shots: Sequence[Shot], encode: Encode, tell: Callable[[str], object]) -> None:
        """Sees to it that all are there; what is there already, and whole, is used.

        Each is encoded alone, so that it follows from its key, whatever others there are.

        Raises:
            DataError: A picture cannot be read any more, or nothing can be kept.
        """
        keys = [shot.key(self.model) for shot in shots]
        make(self.store, "latents", keys, lambda number: self._made(shots[number], encode), tell)
        if self.store.held > _MUCH:
            size = f"{self.store.held / (1 << 30):.1f} GiB of memory"
            tell(f"latents: they take {size}; options.cache=FOLDER keeps any number of them on disk")

    def get(self, shot: Shot) -> Tensors:
        """`mean`, `spread`, and `mask` [1, height, width] where the picture has one.

        With holes also `hole` [1, height, width], 0 or 1, and `around_mean`, `around_spread` of the picture that is
        grey there; where neither mask nor look says which, all of it is one hole.

        Raises:
            DataError: `prepare` has not seen it, or the entry has been damaged or deleted since.
        """
        found = self.store.get(shot.key(self.model))
        if found is None:
            raise DataError(
                "its latents are gone from the cache, or damaged, since the run began; resume the run",
                [shot.picture.path],
            )
        return found

    @torch.no_grad()
    def _made(self, shot: Shot, encode: Encode) -> Tensors:
        pixels, mask = shot.look.of(open_image(shot.picture.path)), shot.mask()
        mean, spread = encode(pixels[None])
        found = {"mean": mean[0], "spread": spread[0]}
        if self.holes:
            hole = shot.look.of_hole() if mask is None else mask
            found |= _around(encode, pixels, torch.ones_like(pixels[:1]) if hole is None else hole, mean.shape[-2:])
        if mask is None:
            return found
        return {**found, "mask": F.interpolate(mask[None], size=mean.shape[-2:], mode="area")[0]}


def _around(encode: Encode, pixels: Tensor, mask: Tensor, size: torch.Size) -> Tensors:
    hole = (mask > 0.5).float()
    mean, spread = encode((pixels * (1 - hole) + 0.5 * hole)[None])
    return {"hole": F.interpolate(hole[None], size=size)[0], "around_mean": mean[0], "around_spread": spread[0]}
