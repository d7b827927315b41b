"""LoRA on grouped convolutions: in PEFT's files A sees the inputs of all groups, and B those ranks of its own group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit.formats.low_rank import factors_of


def is_grouped(place: Place) -> bool:
    """Whether the layer is a convolution of several groups."""
    return len(place.shape) > 2 and place.point.layout.groups > 1


def ungrouped(a: Tensor, b: Tensor, place: Place, context: Context) -> tuple[Tensor, Tensor]:
    """The factors of an update without groups: A [rank, in, *kernel] and B [out, rank].

    Args:
        a, b: As the file has them; B [out, rank / groups, 1, ...].
        place: The layer.
        context: The file.
    """
    groups, rank, (out, width, *kernel) = place.point.layout.groups, len(a), place.shape
    wanted = context.config.get("r")
    told = f"A is {tuple(a.shape)} and B {tuple(b.shape)}, for a weight of {place.shape} in {groups} groups"
    if tuple(a.shape[1:]) != (width * groups, *kernel) or rank % groups or (wanted is not None and wanted != rank):
        raise ShapeMismatchError(told, context.where, place.point.path)
    if b.flatten(1).shape != (out, rank // groups):
        raise ShapeMismatchError(told, context.where, place.point.path)
    return a, torch.block_diag(*b.flatten(1).unflatten(0, (groups, -1)))


def written(said: Sequence[tuple[Place, Said]], context: Context) -> tuple[Tensor, Tensor, int, float]:
    """A, B [out, rank / groups], rank and scale; of an update in groups with a part of A for each group."""
    place, one = said[0]
    groups, out = place.point.layout.groups, place.shape[0]
    if one.config.get("across_groups"):
        a, b = one.tensors["A"], one.tensors["B"]
        blocks = b.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)) if len(a) % groups == 0 else None
        own = None if blocks is None else torch.stack([blocks[i, :, i] for i in range(groups)])
        if own is None or not torch.equal(torch.block_diag(*own), b):
            told = "every rank reaches all groups, and in PEFT's files those of one; native holds it"
            raise CheckpointError(told, context.where, place.point.path)
        alpha = one.config.get("alpha")
        divisor = len(a) ** 0.5 if one.config.get("scaling") == "rank_stabilized" else len(a)
        return a, own.flatten(0, 1), len(a), 1.0 if alpha is None else alpha / divisor
    factors = factors_of(one, place.point, context.where, context.made)
    if factors is None:
        raise CheckpointError(f"{one.type} has no factors here; native holds it", context.where, place.point.path)
    rank, width, *kernel = factors.A.shape
    wide = factors.A.new_zeros(groups, rank, groups, width, *kernel)
    for group in range(groups):
        wide[group, :, group] = factors.A
    return wide.flatten(0, 1).flatten(1, 2), factors.B.reshape(out, rank), rank * groups, factors.scale
