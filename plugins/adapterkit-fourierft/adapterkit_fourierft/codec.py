"""FourierFT as PEFT writes it: the coefficients of a module; their places follow from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError

_NAME = "fourierft_spectrum"


class FourierFTCodec(Codec):
    """`fourierft_spectrum` [coefficients]."""

    names = frozenset({_NAME})
    types = frozenset({"fourierft"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        spectrum = tensors[_NAME]
        if spectrum.ndim != 1 or not 1 <= len(spectrum) <= math.prod(place.shape):
            told = f"is {tuple(spectrum.shape)}, for a weight of {place.shape}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        if not place.whole:
            told = "the spectrum is that of a whole layer, and this model has parts of it alone"
            raise CheckpointError(told, context.where, place.point.path)
        scaling, seed = (context.config.get(name) for name in ("scaling", "random_loc_seed"))
        config = {
            "coefficients": len(spectrum),
            "scaling": 150.0 if scaling is None else scaling,
            "location_seed": 777 if seed is None else seed,
        }
        return Said("fourierft", config, {"spectrum": spectrum})

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = said[0]
        if len(said) > 1 or not place.whole or len(place.shape) > 2 or place.point.form == "embedding":
            told = "PEFT's FourierFT acts on whole linear layers; native holds it"
            raise CheckpointError(told, context.where, place.point.path)
        context.config |= {
            "peft_type": "FOURIERFT",
            "n_frequency": len(one.tensors["spectrum"]),
            "n_frequency_pattern": {},
            "scaling": one.config.get("scaling", 150.0),
            "random_loc_seed": one.config.get("location_seed", 777),
        }
        if place.point.form == "linear_t":
            context.config["fan_in_fan_out"] = True
        return {_NAME: one.tensors["spectrum"]}
