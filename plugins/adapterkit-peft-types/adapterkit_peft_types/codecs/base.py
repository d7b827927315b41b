"""What codecs take from the base."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from adapterkit.contract.codec import Context, Place
from adapterkit.errors import BaseNeededError


def weight_of(place: Place, context: Context) -> Tensor:
    """The base's weight of the whole module, [out, in], float32."""
    if place.model is None:
        told = "the file holds what was learnt, and the rest comes from the base's weight: load it onto its model"
        raise BaseNeededError(told, context.where, place.point.path)
    whole = dataclasses.replace(place.point, span=None, in_span=None)
    return place.model.values(whole)[0].float()
