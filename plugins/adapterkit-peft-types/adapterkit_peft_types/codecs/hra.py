"""HRA in files of PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError
from adapterkit_peft_types.codecs.modules import check_shapes, field
from adapterkit_peft_types.codecs.whole import WholeCodec
from adapterkit_peft_types.hra import HRA


class HRACodec(WholeCodec):
    """`hra_u` [in * kernel, r]; whether Gram-Schmidt runs is in the config."""

    names = required = frozenset({"hra_u"})
    types = frozenset({"hra"})
    peft_type = "HRA"
    forms = frozenset({"linear", "conv"})

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        u = tensors["hra_u"]
        check_shapes(place, context, hra_u=(u, (math.prod(place.shape[1:]), u.shape[-1])))
        config = {"rank": u.shape[1], "gram_schmidt": field(context, "apply_GS", False) if context.config else False}
        return self.at(place, Said("hra", config, {"u": u}), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        layout, kernel = place.point.layout, place.shape[2:]
        alike = all(len({*each}) <= 1 for each in (kernel, layout.stride, layout.padding))
        plain = layout.padding_mode == "zeros" and {*layout.dilation} <= {1} and not isinstance(layout.padding, str)
        if kernel and not (len(kernel) == 2 and alike and plain and layout.groups == 1):
            told = "PEFT's HRA knows square 2d kernels alone, without groups, dilation or padding modes"
            raise CheckpointError(f"{told}; native holds any", context.where, place.point.id)
        config = HRA.from_dict(said.config)
        return {"r": config.rank, "apply_GS": config.gram_schmidt}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {"hra_u": said.tensors["u"]}
