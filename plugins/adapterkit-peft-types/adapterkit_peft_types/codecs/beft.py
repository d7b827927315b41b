"""BEFT in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit_peft_types.codecs.modules import check_shapes
from adapterkit_peft_types.codecs.whole import WholeCodec


class BEFTCodec(WholeCodec):
    """`beft_bias` [1, out]."""

    names = required = frozenset({"beft_bias"})
    types = frozenset({"beft"})
    peft_type = "BEFT"

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        bias = tensors["beft_bias"]
        check_shapes(place, context, beft_bias=(bias, (1, place.shape[0])))
        return self.at(place, Said("beft", {}, {"bias": bias[0]}), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        return {}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {"beft_bias": said.tensors["bias"][None]}
