"""The blocks of a model, and what would be spared if some of them waited on the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from adapterkit.errors import ConfigError
from adapterkit.handle.listing import points
from adapterkit.mapping.everywhere import block_points
from adapterkit.training.loading import dtype_of


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model in its order, each once; of blocks in blocks the outer ones."""
    found = points(model)
    components = dict.fromkeys(point.component for point in found)
    each = [block_points(model, [p for p in found if p.component == component]) for component in components]
    paths = {point.path for own in each for point in own}
    outer = [path for path, _ in model.named_modules() if path in paths and not _is_inside(path, paths)]
    return [model.get_submodule(path) for path in outer]


def _is_inside(path: str, paths: set[str]) -> bool:
    names = path.split(".")
    return any(".".join(names[:count]) in paths for count in range(1, len(names)))


def swapped_blocks(model: nn.Module, count: int) -> list[nn.Module]:
    """The last blocks of a model, so many.

    Raises:
        ConfigError: It has fewer.
    """
    blocks = blocks_of(model)
    if count > len(blocks):
        told = f"{type(model).__name__} has {len(blocks)} blocks, and {count} are to be swapped"
        raise ConfigError([f"block_swap: {told}; say {len(blocks)} at most"], "run")
    return blocks[len(blocks) - count :]


def weights_of(model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """Of each block the parameters that nothing outside of it has."""
    everywhere = _places(model)
    return [[p for p in block.parameters() if _places(block)[id(p)] == everywhere[id(p)]] for block in blocks]


def _places(module: nn.Module) -> Counter[int]:
    return Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))


def waiting_bytes(model: nn.Module, count: int, dtype: str) -> int:
    """What so many blocks spare the device, which has one of them at a time.

    Args:
        model: The model, or its outline.
        count: Of the last blocks.
        dtype: Of its weights.

    Raises:
        ConfigError: It has fewer.
    """
    itemsize = dtype_of(dtype).itemsize
    sizes = [sum(p.numel() for p in own) * itemsize for own in weights_of(model, swapped_blocks(model, count))]
    return sum(sizes) - max(sizes, default=0)
