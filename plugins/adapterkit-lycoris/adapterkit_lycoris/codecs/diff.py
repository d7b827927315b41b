"""Whole differences: of weights and biases, and of norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import ShapeMismatchError
from adapterkit.points import NormPoint

_WEIGHT, _BIAS, _GAIN, _SHIFT = "diff", "diff_b", "w_norm", "b_norm"
_SPARSE = frozenset({"bias_indices", "bias_values", "bias_size"})


class DiffCodec(Codec):
    """`diff` of the weight's shape and `diff_b` [out], also as a sparse one; of norms `w_norm` and `b_norm`."""

    names = frozenset({_WEIGHT, _BIAS, _GAIN, _SHIFT, *_SPARSE})
    types = frozenset({"full_diff", "norm_diff"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        sparse = _SPARSE if names >= _SPARSE else frozenset()
        return (names & {_WEIGHT, _BIAS, _GAIN, _SHIFT}) | sparse

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get(_WEIGHT, tensors.get(_GAIN))
        return None if weight is None else tuple(weight.shape)

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        weight, bias = tensors.get(_WEIGHT, tensors.get(_GAIN)), tensors.get(_BIAS, tensors.get(_SHIFT))
        if tensors.keys() >= _SPARSE:
            bias = _scattered(tensors, place, context)
        own: dict[str, Tensor] = {}
        if weight is not None:
            if weight.numel() != torch.Size(place.shape).numel() or weight.shape[0] != place.shape[0]:
                told = f"its difference is {tuple(weight.shape)}, and the model's weight {place.shape}"
                raise ShapeMismatchError(told, context.where, place.point.path)
            weight = place.of_rows(weight.reshape(place.shape))
            own["diff"] = (weight if place.columns is None else place.of_columns(weight)).contiguous()
        if bias is not None:
            own["diff_b"] = place.of_rows(bias.flatten()).contiguous()
        part = "all" if len(own) == 2 else "weight" if weight is not None else "bias"
        if isinstance(place.point, NormPoint):
            return Said("norm_diff", {"part": part}, own)
        return Said("full_diff", {"part": part}, own)

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        first, one = said[0]
        names = {"diff": _GAIN, "diff_b": _SHIFT} if one.type == "norm_diff" else {"diff": _WEIGHT, "diff_b": _BIAS}
        if len(said) == 1 and first.whole:
            return {names[name]: tensor for name, tensor in one.tensors.items()}
        found: dict[str, Tensor] = {}
        for place, own in said:
            for name, tensor in own.tensors.items():
                shape = first.shape if name == "diff" else first.shape[:1]
                whole = found.setdefault(names[name], tensor.new_zeros(shape))
                rows = slice(None) if place.rows is None else _index(place.rows)
                if name == "diff" and place.columns is not None:
                    whole[rows, _index(place.columns)] = tensor
                else:
                    whole[rows] = tensor
        return found


def _index(places: slice | Sequence[int]) -> slice | list[int]:
    return places if isinstance(places, slice) else list(places)


def _scattered(tensors: Mapping[str, Tensor], place: Place, context: Context) -> Tensor:
    """A bias of which only some entries differ."""
    size, indices, values = (tensors[f"bias_{name}"] for name in ("size", "indices", "values"))
    if size.flatten().tolist() != [place.shape[0]]:
        told = f"its bias has {size.flatten().tolist()} entries, and the model's layer {place.shape[0]} outputs"
        raise ShapeMismatchError(told, context.where, place.point.path)
    return values.new_zeros(place.shape[0]).index_put((indices.flatten().long(),), values.flatten())
