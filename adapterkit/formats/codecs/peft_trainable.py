"""Parts of the model that were trained themselves, as PEFT writes them: modules, biases, norms, rows of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, InvalidHeaderError, ShapeMismatchError, shown
from adapterkit.formats.codecs.peft_base import whole_base
from adapterkit.kernels.weights import canonical

_LAYER = ("weight", "bias")
_BENEATH = ("base_layer.weight", "base_layer.bias")
_NORM = ("ln_tuning_layers.weight", "ln_tuning_layers.bias")
_ROWS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")


class TrainableCodec(Codec):
    """The values themselves, in the layout of the layer: `modules_to_save`, `bias`, LN tuning, trainable tokens."""

    names = frozenset({*_LAYER, *_BENEATH, *_NORM, *_ROWS})
    types = frozenset({"trainable"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return next((own for group in (_ROWS, _NORM, _BENEATH, _LAYER) if (own := {*group} & names)), frozenset())

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        told = next((tensor for tensor in _pair(tensors) if tensor is not None), None)
        return None if told is None else tuple(told.shape)

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said | Sequence[Said]:
        if rows := [tensors[name] for name in _ROWS if name in tensors]:
            return _rows(rows[0], place, context)
        weight, bias = _pair(tensors)
        _check(bias, place.shape[:1], place, context)
        if weight is None:
            own = {} if bias is None else {"bias": place.of_rows(bias).contiguous()}
            return Said("trainable", {"part": "bias", "absolute": True, "rows": None}, own)
        weight = _of_point(weight, place, context)
        if _BENEATH[0] in tensors and place.model is not None:
            if torch.equal(weight, place.model.values(place.point)[0].to(weight.dtype)):
                return []  # PEFT saves a targeted embedding beside what it has learnt
            context.note("base_layer.weight: an embedding of the base itself was changed, and is read with the adapter")
        own = {"weight": weight}
        if bias is not None and place.point.layout.bias:
            own["bias"] = place.of_rows(bias).contiguous()
        part = "all" if "bias" in own or not place.point.layout.bias else "weight"
        return Said("trainable", {"part": part, "absolute": False, "rows": None}, own)

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        parts = {_part(one) for _, one in said}
        if len(parts) > 1:
            told = f"{' and '.join(sorted(parts))} of one layer; native holds both"
            raise CheckpointError(told, context.where, said[0][0].point.path)
        part = parts.pop()
        if part == "rows":
            return _written_rows(said, context)
        if part == "bias":
            context.config["bias"] = "all"
            return {"bias": _written_bias(said, context)}
        context.config["modules_to_save"] = {said[0][0].point.path}
        return _written_layer(said, context)


def _pair(tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    found = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    return found.get("weight"), found.get("bias")


def _check(tensor: Tensor | None, shape: Sequence[int], place: Place, context: Context) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        told = f"is {tuple(tensor.shape)}, and the model's is {tuple(shape)}"
        raise ShapeMismatchError(told, context.where, place.point.path)


def _of_point(weight: Tensor, place: Place, context: Context) -> Tensor:
    """A layer's weight as the file has it -> the point's, [out, in / groups, *kernel]."""
    layout = place.point.layout
    if layout.index is not None:
        if weight.ndim != 3 or len(weight) != place.stack:
            told = f"is {tuple(weight.shape)}, for a stack of {place.stack}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        weight = weight[layout.index]
    weight = canonical(weight, layout)
    _check(weight, place.shape, place, context)
    return place.of_columns(place.of_rows(weight)).contiguous() if weight.ndim > 1 else weight


# -- rows of embeddings -------------------------------------------------------------------------------------------


def _rows(values: Tensor, place: Place, context: Context) -> Said:
    rows = _indices(place, context)
    width = place.point.out_features if place.point.form == "embedding" else place.point.in_features
    _check(values, (len(rows), width), place, context)
    return Said("trainable", {"part": "all", "absolute": False, "rows": rows}, {"values": values.contiguous()})


def _indices(place: Place, context: Context) -> list[int]:
    """Which rows the file has."""
    given: Any = context.config.get("trainable_token_indices") or context.config.get("token_indices")
    if not isinstance(given, list) or not all(type(row) is int and row >= 0 for row in given):
        told = f"must list the rows that were trained at {place.point.path}, not {shown(given)}"
        raise InvalidHeaderError(told, context.where, "trainable_token_indices")
    return given


def _written_rows(said: Sequence[tuple[Place, Said]], context: Context) -> dict[str, Tensor]:
    place, one = said[0]
    context.config["trainable_token_indices"] = {place.point.path: list(one.config["rows"])}
    return {_ROWS[0]: one.tensors["values"]}


# -- layers -------------------------------------------------------------------------------------------------------


def _part(said: Said) -> str:
    if said.config.get("rows") is not None:
        return "rows"
    return "bias" if said.config.get("part") == "bias" else "layer"


def _written_bias(said: Sequence[tuple[Place, Said]], context: Context) -> Tensor:
    """The whole layer's: a change is put on the base's, which stands where no point has one."""
    place, one = said[0]
    if place.whole and "bias" in one.tensors:
        return one.tensors["bias"]
    base = whole_base(place, context.where)[1]
    found = torch.zeros(place.shape[0]) if base is None else base.clone()
    for own, one in said:
        rows = slice(None) if own.rows is None else own.rows if isinstance(own.rows, slice) else list(own.rows)
        found[rows] = one.tensors["bias"] if "bias" in one.tensors else found[rows] + one.tensors["shift"]
    return found


def _written_layer(said: Sequence[tuple[Place, Said]], context: Context) -> dict[str, Tensor]:
    """Weight and bias as the layer keeps them, both whole: PEFT reads all parameters of a module or none."""
    place, one = said[0]
    layout = place.point.layout
    if layout.index is not None:
        told = "weights of single experts; native holds them"
        raise CheckpointError(told, context.where, place.point.path)
    if place.whole and ("bias" in one.tensors or not layout.bias):
        found = dict(one.tensors)
    else:
        weight, bias = (None if tensor is None else tensor.clone() for tensor in whole_base(place, context.where))
        found = {name: tensor for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None}
        for own, one in said:
            _put(found, own, one)
    return {**found, "weight": canonical(found["weight"], layout).contiguous()}


def _put(whole: Mapping[str, Tensor], place: Place, said: Said) -> None:
    rows, columns = (
        slice(None) if some is None else some if isinstance(some, slice) else list(some)
        for some in (place.rows, place.columns)
    )
    weight = whole["weight"]
    if weight.ndim > 1 and place.columns is not None:
        weight[rows, columns] = said.tensors["weight"].to(weight.dtype)
    else:
        weight[rows] = said.tensors["weight"].to(weight.dtype)
    if "bias" in said.tensors and "bias" in whole:
        whole["bias"][rows] = said.tensors["bias"].to(weight.dtype)
