"""Rotations: kohya's OFT, LyCORIS' diag-OFT and BOFT. Here alpha is a bound on the rotation and never a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit_lycoris.codecs.updates import ALPHA, only, require_whole

_BLOCKS, _RESCALE = "oft_blocks", "rescale"


class OFTCodec(Codec):
    """`oft_blocks` [blocks, b, b] of OFT, whose transposes rotate, or [factors, blocks, b, b] of BOFT."""

    names = frozenset({_BLOCKS, ALPHA, _RESCALE})
    types = frozenset({"oft", "boft"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names if _BLOCKS in names else frozenset()

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        blocks = tensors[_BLOCKS]
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
            told = f"oft_blocks is {tuple(blocks.shape)}; expected [blocks, b, b], or [factors, blocks, b, b]"
            raise ShapeMismatchError(told, context.where, place.point.path)
        if (rows := blocks.shape[-3] * blocks.shape[-1]) != place.shape[0]:
            told = f"it rotates {rows} outputs, and the model's layer has {place.shape[0]}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        bound = float(tensors[ALPHA]) if ALPHA in tensors else 0.0
        config: dict[str, Any] = {"block": blocks.shape[-1], "rescale": _RESCALE in tensors}
        if bound > 0:
            config |= {"constraint": bound, "constraint_on": "layer"}
        own = {"oft_blocks": _own(blocks, place, bound, context)}
        if _RESCALE in tensors:
            own["rescale"] = place.of_rows(tensors[_RESCALE].flatten()).contiguous()
        if blocks.ndim == 3:
            return Said("oft", config, own)
        return Said("boft", {**config, "butterfly": blocks.shape[0]}, own)

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = only(said, context)
        bound = _writable_bound(one, place, context)
        own = one.tensors["oft_blocks"]
        blocks = _reordered(own, (2, -1)) if one.type == "boft" else own[0].mT.contiguous()
        found = {_BLOCKS: blocks, ALPHA: torch.tensor(float(bound))}
        if "rescale" in one.tensors:
            found[_RESCALE] = one.tensors["rescale"].view(-1, *(1,) * (len(place.shape) - 1))
        return found


def _own(blocks: Tensor, place: Place, bound: float, context: Context) -> Tensor:
    if blocks.ndim == 4:
        require_whole(place, "BOFT", context)
        return _reordered(blocks, (-1, 2))
    rows, size = place.rows, blocks.shape[-1]
    if rows is not None or place.columns is not None:
        if not isinstance(rows, slice) or rows.start % size or rows.stop % size or bound > 0:
            require_whole(place, "OFT with these blocks", context)
            return blocks
        blocks = blocks[rows.start // size : rows.stop // size]
    return blocks.mT.unsqueeze(0).contiguous()


def _reordered(blocks: Tensor, halves: tuple[int, int]) -> Tensor:
    """Files interleave the two halves of a block element by element; here they follow one another."""
    order = torch.arange(blocks.shape[-1]).view(halves).mT.flatten()
    return blocks[..., order, :][..., order].contiguous()


def _writable_bound(said: Said, place: Place, context: Context) -> float:
    config = said.config
    if config.get("side", "output") != "output":
        told = f"{said.type} of inputs cannot be said here; peft can"
        raise CheckpointError(told, context.where, place.point.id)
    bound = config.get("constraint")
    if bound is not None and config.get("constraint_on", "block") != "layer":
        told = "a bound on each block cannot be said, only one on all blocks of a layer (constraint_on='layer')"
        raise CheckpointError(f"{told}; native holds it", context.where, place.point.id)
    return 0.0 if bound is None else bound
