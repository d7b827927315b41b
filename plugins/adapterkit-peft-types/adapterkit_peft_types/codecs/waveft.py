"""WaveFT in files of PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError
from adapterkit_peft_types import wavelets
from adapterkit_peft_types.codecs.modules import check_shapes, field, number
from adapterkit_peft_types.codecs.whole import WholeCodec
from adapterkit_peft_types.waveft import WaveFT


class WaveFTCodec(WholeCodec):
    """`waveft_spectrum` [n], at places that follow from the config."""

    names = required = frozenset({"waveft_spectrum"})
    types = frozenset({"waveft"})
    peft_type = "WAVEFT"
    forms = frozenset({"linear", "linear_t"})

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        values, size = tensors["waveft_spectrum"], math.prod(place.shape)
        check_shapes(place, context, waveft_spectrum=(values, (min(values.numel(), size),)))
        wavelet = field(context, "wavelet_family", "db1")
        if wavelet not in wavelets.NAMES:
            told = f"the wavelet {wavelet!r} is none that PEFT computes with; known: {', '.join(wavelets.NAMES)}"
            raise CheckpointError(told, context.where, "wavelet_family")
        config = {
            "coefficients": len(values),
            "scaling": float(field(context, "scaling", 25.0)),
            "wavelet": wavelet,
            "transform": field(context, "use_idwt", True),
            "location_seed": field(context, "random_loc_seed", 777),
        }
        return self.at(place, Said("waveft", config, {"values": values}), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        config = WaveFT.from_dict(said.config)
        return {
            "n_frequency": len(said.tensors["values"]),
            "n_frequency_pattern": {},
            "scaling": number(config.scaling),
            "wavelet_family": config.wavelet,
            "use_idwt": config.transform,
            "random_loc_seed": config.location_seed,
            "fan_in_fan_out": place.point.form == "linear_t",
        }

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {"waveft_spectrum": said.tensors["values"]}
