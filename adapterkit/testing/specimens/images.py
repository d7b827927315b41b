"""Pictures as transformers' models take them: whole, in patches with a grid, with positions, in crops."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

Inputs = dict[str, Any]
ROWS: Final = 2
_GRID: Final = 4
_SEED: Final = 1


@dataclass(frozen=True)
class Picture:
    """How big the pictures of a vision tower are.

    Attributes:
        side: Pixels, of a square one.
        patch: Pixels of a patch's side.
        channels: Colours.
        frames: Pictures that one patch reaches through, in time.
    """

    side: int
    patch: int
    channels: int
    frames: int

    @classmethod
    def of(cls, config: object) -> Picture:
        """Read it from the config of a vision tower."""
        patch = size_in(config, ("patch_size", "spatial_patch_size", "crop_size"), 16)
        side = size_in(config, ("image_size", "img_size", "input_size"), _GRID * patch)
        frames = size_in(config, ("temporal_patch_size", "patch_temporal"), 1)
        return cls(side, patch, size_in(config, ("num_channels", "in_channels", "in_chans"), 3), frames)

    @property
    def pixels(self) -> int:
        """Numbers in one patch."""
        return self.channels * self.frames * self.patch**2


def size_in(config: object, names: tuple[str, ...], default: int) -> int:
    """The first of some attributes that says a size; of lists and pairs the first number."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
    return default


def noise(*shape: int) -> Tensor:
    """The same random numbers of a shape each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)


def image_inputs(config: object, names: Collection[str]) -> Iterator[Inputs]:
    """The ways to give two pictures to a function with parameters of these names, the likeliest first.

    Args:
        config: The vision tower's.
        names: What the function takes.
    """
    picture = Picture.of(config)
    for name, ways in _WAYS.items():
        if name in names:
            yield from ways(picture, name, config)
            return
    for name in ("pixel_values", "pixel_values_images"):
        if name in names:
            yield from _whole(picture, name, config)


def _whole(picture: Picture, name: str, _: object) -> Iterator[Inputs]:
    whole = noise(ROWS, picture.channels, picture.side, picture.side)
    yield {name: whole, "high_res_pixel_values": whole}
    crops = {name: noise(ROWS, 1, picture.channels, picture.side, picture.side)}
    yield crops
    yield {**crops, "pixel_attention_mask": torch.ones(ROWS, 1, dtype=torch.bool)}
    yield {name: noise(ROWS, _GRID**2, picture.pixels)}
    yield {name: noise(ROWS, picture.frames, picture.side, picture.side, picture.channels)}


def _gridded(picture: Picture, name: str, _: object) -> Iterator[Inputs]:
    """All patches of all pictures in a row; a grid says how many of them are whose."""
    size = [_GRID, _GRID] if name.endswith("_hw") else [1, _GRID, _GRID]
    grid, patches = torch.tensor([size] * ROWS), ROWS * _GRID**2
    merges = {"image_merge_sizes": torch.tensor([2] * ROWS)}
    for still in (picture.pixels, picture.pixels // picture.frames):
        yield {"pixel_values": noise(patches, still), name: grid, **merges}
    yield {"pixel_values": noise(patches, picture.channels, picture.patch, picture.patch), name: grid, **merges}
    yield {"pixel_values": noise(patches, 2 * picture.patch, 2 * picture.patch, picture.channels), name: grid}


def _shaped(picture: Picture, name: str, config: object) -> Iterator[Inputs]:
    """Patches of each picture, padded; how high and wide it is in patches."""
    room = size_in(config, ("num_patches",), _GRID**2)
    mask = (torch.arange(room) < _GRID**2).long().expand(ROWS, room)
    sizes = torch.tensor([[_GRID, _GRID]] * ROWS)
    yield {"pixel_values": noise(ROWS, room, picture.pixels), name: sizes, "pixel_attention_mask": mask}


def _positioned(picture: Picture, name: str, config: object) -> Iterator[Inputs]:
    """Patches of each picture with their places (x, y)."""
    pooled = size_in(config, ("pooling_kernel_size",), 1)
    side = pooled * max(2, _GRID // pooled)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1).expand(ROWS, -1, -1)
    for pixels in (picture.pixels, picture.pixels * pooled**2):
        yield {"pixel_values": noise(ROWS, side**2, pixels), name: places}


def _packed(picture: Picture, name: str, _: object) -> Iterator[Inputs]:
    """One strip of all patches of all pictures, as high as one; how high and wide each is in patches."""
    sizes = torch.tensor([[_GRID, _GRID]] * ROWS, dtype=torch.int32)
    yield {"pixel_values": noise(1, picture.channels, picture.patch, ROWS * _GRID**2 * picture.patch), name: sizes}


def _cropped(picture: Picture, name: str, config: object) -> Iterator[Inputs]:
    """A small picture and crops, as many as the sizes say; or pictures with their own sizes."""
    side = picture.side
    sizes = torch.tensor([[side, side]] * ROWS)
    yield {"pixel_values": noise(ROWS, 3, picture.channels, side, side), name: torch.tensor([[2 * side, side]] * ROWS)}
    yield {"pixel_values": noise(ROWS, picture.channels, side, side), name: sizes}
    yield {"pixel_values": noise(ROWS, picture.channels, side, side)}
    yield {
        "pixel_values": noise(ROWS, 5, picture.channels, side, side),
        name: torch.tensor([[2 * side, 2 * side]] * ROWS),
    }


def _pooled(picture: Picture, name: str, _: object) -> Iterator[Inputs]:
    """Crops in patches, and which patches are pooled to one token."""
    count = (picture.side // picture.patch) ** 2
    pooled = torch.arange(ROWS * count).view(-1, 4)
    grids = torch.tensor([[1, count // 4, 0, 0]] * ROWS)
    crops = torch.ones(ROWS, dtype=torch.long)
    patches = noise(ROWS, count, picture.pixels)
    yield {"pixel_values": patches, name: pooled, "image_grids": grids, "image_num_crops": crops}


def _tiled(picture: Picture, name: str, config: object) -> Iterator[Inputs]:
    """Tiles of each picture; which of the allowed arrangements they are in."""
    tiles = size_in(config, ("max_num_tiles",), 1)
    pixels = noise(ROWS, 1, tiles, picture.channels, picture.side, picture.side)
    mask = torch.ones(ROWS, 1, tiles, dtype=torch.long)
    yield {"pixel_values": pixels, name: torch.ones(ROWS, 1, dtype=torch.long), "aspect_ratio_mask": mask}


def _flattened(picture: Picture, name: str, config: object) -> Iterator[Inputs]:
    """Patches of each picture, each behind its row and column."""
    places = 1 + torch.cartesian_prod(torch.arange(_GRID), torch.arange(_GRID)).double().expand(ROWS, -1, -1)
    for pixels in (picture.pixels, size_in(config, ("patch_embed_hidden_size",), picture.pixels)):
        yield {name: torch.cat([places, noise(ROWS, _GRID**2, pixels)], -1)}


_WAYS: Final[Mapping[str, Callable[[Picture, str, object], Iterator[Inputs]]]] = {
    "flattened_patches": _flattened,
    "image_grid_thw": _gridded,
    "image_grid_hw": _gridded,
    "spatial_shapes": _shaped,
    "image_position_ids": _positioned,
    "target_sizes": _packed,
    "image_token_pooling": _pooled,
    "aspect_ratio_ids": _tiled,
    "image_sizes": _cropped,
}
"""Parameter that tells how a function takes pictures -> the ways to give them to it."""
