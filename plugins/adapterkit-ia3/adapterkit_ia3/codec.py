"""(IA)3 as PEFT writes it: one vector for a module, of its outputs or, in feed-forward modules, of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit.selectors import Selector

_NAME = "ia3_l"


class IA3Codec(Codec):
    """`ia3_l` [out, 1] or [1, in], of a convolution [1, out or in, 1, ...]."""

    names = frozenset({_NAME})
    types = frozenset({"ia3"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        vector, point = tensors[_NAME], place.point
        inputs = _of_inputs(vector, place, context)
        wanted = point.in_features if inputs else place.shape[0]
        if vector.numel() != wanted:
            told = f"is {tuple(vector.shape)}, for a layer with {wanted} {'inputs' if inputs else 'outputs'}"
            raise ShapeMismatchError(told, context.where, point.path)
        scale = vector.flatten() if inputs else place.of_rows(vector.flatten())
        return Said("ia3", {"scale_input": point.role if inputs else None}, {"scale": scale.contiguous()})

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = said[0]
        context.config["peft_type"] = "IA3"
        context.config["feedforward_modules"] = set[str]()
        if place.point.form == "linear_t":
            context.config["fan_in_fan_out"] = True
        selector = one.config.get("scale_input")
        inputs = selector is not None and Selector(selector).matches(place.point)
        if inputs:
            context.config["feedforward_modules"] = {place.point.path}
            if len(said) > 1 or not place.whole:
                told = (
                    "scales the input of a part of a fused layer, and PEFT's (IA)3 that of all of it; native holds it"
                )
                raise CheckpointError(told, context.where, place.point.path)
            vector = one.tensors["scale"]
        else:
            vector = torch.ones(place.shape[0])
            for own, part in said:
                rows = slice(None) if own.rows is None else own.rows if isinstance(own.rows, slice) else list(own.rows)
                vector[rows] = part.tensors["scale"].to(vector.dtype)
        if len(place.shape) > 2:
            return {_NAME: vector.reshape(1, -1, *(1,) * (len(place.shape) - 2))}
        return {_NAME: vector[None] if inputs else vector[:, None]}


def _of_inputs(vector: Tensor, place: Place, context: Context) -> bool:
    """Whether a vector is of the inputs; the config tells where its shape does not."""
    if vector.ndim == 2 and 1 in vector.shape and vector.numel() > 1:
        return vector.shape[0] == 1
    return bool(context.config.get("feedforward_modules"))
