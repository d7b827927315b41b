"""BOFT as PEFT writes it: rotations of the inputs, and a factor for every output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit.formats.modules import made_up
from adapterkit_lycoris.codecs.peft_common import whole
from adapterkit_lycoris.oft import BOFT

_R, _S = "boft_R", "boft_s"


class BOFTCodec(Codec):
    """`boft_R` [factors, blocks, block, block], `boft_s` [out, 1]; of a convolution [1, out]."""

    names = frozenset({_R, _S})
    types = frozenset({"boft"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names if self.names <= names else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        blocks = tensors[_R]
        return (tensors[_S].numel(), blocks.shape[1] * blocks.shape[2])

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        blocks, scale = tensors[_R], tensors[_S]
        inputs = torch.Size(place.shape[1:]).numel()
        told = f"R is {tuple(blocks.shape)} and s {tuple(scale.shape)}, for a weight of {place.shape}"
        if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3] or scale.numel() != place.shape[0]:
            raise ShapeMismatchError(told, context.where, place.point.path)
        if blocks.shape[1] * blocks.shape[2] != inputs:
            raise ShapeMismatchError(told, context.where, place.point.path)
        block, factors = blocks.shape[2], blocks.shape[0]
        own = {"oft_blocks": blocks / 2, "rescale": place.of_rows(scale.flatten()).contiguous()}
        config = {"block": block, "butterfly": factors, "side": "input", "rescale": True}
        if torch.Size(place.shape[2:]).numel() == 1:
            return Said("boft", config, own)
        return _difference(config, own, place, context)

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = whole(said, "BOFT", context)
        if one.config.get("side") != "input" or one.config.get("constraint"):
            told = "PEFT's BOFT rotates what a layer takes, without a constraint; native and lycoris hold this one"
            raise CheckpointError(told, context.where, place.point.path)
        blocks = one.tensors["oft_blocks"]
        scale = one.tensors.get("rescale", torch.ones(place.shape[0]))
        context.config |= {
            "peft_type": "BOFT",
            "boft_block_size": frozenset(
                [
                    (("boft_block_size", blocks.shape[2]), ("boft_block_num", 0)),
                    (("boft_block_size", 0), ("boft_block_num", blocks.shape[1])),
                ]
            ),
            "boft_n_butterfly_factor": blocks.shape[0],
        }
        if place.point.form == "linear_t":
            context.config["fan_in_fan_out"] = True
        if blocks.shape[0] > 1:
            context.note("PEFT reads several butterfly factors with CUDA alone, and takes but one elsewhere")
        return {_R: blocks - blocks.mT, _S: scale[None] if len(place.shape) > 2 else scale[:, None]}


def _difference(config: Mapping[str, Any], own: Mapping[str, Tensor], place: Place, context: Context) -> Said:
    """A rotation of a convolution's patches as what it changes of the weight."""
    if place.model is None:
        raise CheckpointError("BOFT of patches is read for a model alone", context.where, place.point.path)
    weight = place.model.values(place.point)[0]
    flat = weight.flatten(1)
    module = BOFT.from_dict(config).build(made_up("model", place.point.path, flat.shape).point)
    module.load_state_dict({name: tensor.to(flat.dtype) for name, tensor in own.items()}, assign=True)
    with torch.no_grad():
        turned = module.merged(flat, None)[0].view_as(weight)
    context.note("BOFT of convolutions rotates patches, and is kept as differences of weights")
    return Said("full_diff", {"part": "weight"}, {"diff": turned - weight})
