"""HiRA in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import ShapeMismatchError
from adapterkit_peft_types.codecs.modules import ModuleCodec, check_shapes, dropout

_PAIRS = (("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B"))


class HiRACodec(ModuleCodec):
    """A [r, in, *kernel] and B [out, r, 1, ...]; at embeddings they have other names."""

    names = frozenset(name for pair in _PAIRS for name in pair)
    types = frozenset({"hira"})
    peft_type = "HIRA"
    forms = frozenset({"linear", "linear_t", "conv", "embedding"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return next((set(pair) for pair in _PAIRS if {*pair} <= names), frozenset())

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        a, b = _pair(tensors)
        return (b.shape[0], *a.shape[1:])

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        a, b = _pair(tensors)
        rank, ones = a.shape[0], (1,) * (a.ndim - 2)
        check_shapes(place, context, A=(a, (rank, *place.shape[1:])), B=(b, (place.shape[0], rank, *ones)))
        own = {"A": place.of_columns(a).contiguous(), "B": place.of_rows(b.flatten(1)).contiguous()}
        return Said("hira", {"rank": rank, **dropout(context, "hira_dropout")}, own)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        return {
            "r": said.config["rank"],
            "rank_pattern": {},
            "hira_dropout": said.config.get("dropout", 0.0),
            "fan_in_fan_out": place.point.form == "linear_t",
        }

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        a, b = _PAIRS[1] if place.point.form == "embedding" else _PAIRS[0]
        own = said.tensors["B"]
        return {a: said.tensors["A"], b: own.reshape(*own.shape, *(1,) * (said.tensors["A"].ndim - 2))}


def _pair(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    a, b = next(pair for pair in _PAIRS if pair[0] in tensors)
    if min(tensors[a].ndim, tensors[b].ndim) < 2 or not tensors[a].numel():
        told = f"{a} is {tuple(tensors[a].shape)} and {b} {tuple(tensors[b].shape)}"
        raise ShapeMismatchError(f"{told}; two axes or more are expected")
    return tensors[a], tensors[b]
