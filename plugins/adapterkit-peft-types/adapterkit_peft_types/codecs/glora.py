"""Elementwise GLoRA in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError, UnsupportedFileError
from adapterkit.points import WeightPoint
from adapterkit_peft_types.codecs.modules import ModuleCodec, field
from adapterkit_peft_types.glora import ElementwiseGLoRA

_PARTS = {"Xd": "down", "Xu": "up", "X": "value"}
_KINDS = {"low_rank": "lora", "rows": "vector", "columns": "vector", "constant": "constant", "none": "none"}
_FIELDS = {"weight": "A", "coupling": "C", "bias": "D"}
_SAID = {"weight": "config_A_B", "coupling": "config_C", "bias": "config_D_E"}
_EMPTY = "zeros"
"""What PEFT keeps in the place of a path that is not there: a tensor of zeros."""


class GLoRACodec(ModuleCodec):
    """Paths A to E, each two factors, a vector, a number, or zeros."""

    names = frozenset(f"glora_{path}.{part}" for path in "ABCDE" for part in (*_PARTS, _EMPTY))
    types = frozenset({"elementwise_glora"})
    peft_type = "GLORA"

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        if {"glora_A.Xd", "glora_A.Xu"} <= tensors.keys():
            return (tensors["glora_A.Xd"].shape[0], tensors["glora_A.Xu"].shape[1])
        found = tensors.get("glora_A.zeros")
        return None if found is None else tuple(found.shape)

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        (out, width), own, ranks = place.shape[:2], dict[str, Tensor](), set[int]()
        for name, tensor in tensors.items():
            path, part = name.removeprefix("glora_").split(".")
            expected = _shapes(path, part, tensor, out, width)
            if tuple(tensor.shape) not in expected:
                told = f"{name} is {tuple(tensor.shape)}, for a weight of {place.shape}"
                raise ShapeMismatchError(told, context.where, place.point.path)
            if part == _EMPTY:
                if bool(tensor.any()):
                    raise CheckpointError(f"{name} is not zero, and nothing says what it is", context.where, name)
                continue
            ranks |= {tensor.shape[1]} if part == "Xd" else set()
            own[f"{path}.{_PARTS[part]}"] = _taken(place, path, part, tensor)
        if "D.value" in own and context.modules.get(place.point.path, set()) & {"bias", "base_layer.bias"}:
            told = "GLoRA multiplies biases that are trained beside it, and no type here says both"
            raise UnsupportedFileError(f"{told}; in PEFT, merge it", context.where, place.point.path)
        if len(ranks) > 1:
            raise ShapeMismatchError(f"its paths have ranks {sorted(ranks)}", context.where, place.point.path)
        kinds = {name: _kind(tensors, path, place) or _meant(name, context) for name, path in _FIELDS.items()}
        rank = ranks.pop() if ranks else field(context, "r", ElementwiseGLoRA.rank) if context.config else 1
        return Said("elementwise_glora", {"rank": rank, **kinds}, own)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        own = ElementwiseGLoRA.from_dict(said.config)
        return {
            "r": own.rank,
            "config_A_B": _KINDS[own.weight],
            "config_C": _KINDS[own.coupling],
            "config_D_E": _KINDS[own.bias],
        }

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        names = {ours: theirs for theirs, ours in _PARTS.items()}
        found = {}
        for name, tensor in said.tensors.items():
            path, _, part = name.partition(".")
            found[f"glora_{path}.{names[part]}"] = tensor
        out, width = place.shape[:2]
        like = next(iter(said.tensors.values()))
        for path, shape in _empty(out, width).items():
            if not any(name.startswith(f"{path}.") for name in said.tensors):
                found[f"glora_{path}.{_EMPTY}"] = torch.zeros(shape, dtype=like.dtype)
        return found


def _meant(name: str, context: Context) -> str:
    """What a field is by the file's config."""
    vector = "columns" if name == "coupling" else "rows"
    known = {"lora": "low_rank", "vector": vector, "constant": "constant", "none": "none"}
    own: str = getattr(ElementwiseGLoRA, name)
    return known.get(str(context.config.get(_SAID[name])), own)


def _empty(out: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of zeros."""
    return {"A": (out, width), "B": (out, width), "C": (width, 1), "D": (out,), "E": (out,)}


def _shapes(path: str, part: str, tensor: Tensor, out: int, width: int) -> list[tuple[int, ...]]:
    """What a tensor may be like."""
    if part == _EMPTY:
        return [_empty(out, width)[path]]
    rows, columns = {"A": (out, width), "B": (out, width), "C": (width, 1)}.get(path, (out, 1))
    if part == "Xd":
        return [(rows, tensor.shape[-1])]
    if part == "Xu":
        return [(tensor.shape[0], columns)]
    return [(width, 1)] if path == "C" else [(1,), (out, 1) if path in "AB" else (out,)]


def _taken(place: Place, path: str, part: str, tensor: Tensor) -> Tensor:
    """The part of a path that is a point's: C, and the second factors, see all inputs."""
    if path != "C" and (part == "Xd" or (part == "X" and tensor.shape[0] > 1)):
        return place.of_rows(tensor).contiguous()
    if part == "Xu" and path in "AB":
        return place.of_columns(tensor).contiguous()
    return tensor


def _kind(tensors: Mapping[str, Tensor], path: str, place: Place) -> str | None:
    """What a path is; None where the layer has no bias for it to act on, so that the file cannot tell."""
    if f"glora_{path}.Xd" in tensors:
        return "low_rank"
    value = tensors.get(f"glora_{path}.X")
    if value is None:
        of_bias = path != "A" and isinstance(place.point, WeightPoint) and not place.point.layout.bias
        return None if of_bias else "none"
    if path == "C":
        return "columns"
    return "rows" if value.ndim == 2 or value.shape[0] > 1 else "constant"
