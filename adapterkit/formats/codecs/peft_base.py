"""The base's weights, where a file's tensors say what they are in place of, or cover but a part of a layer."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from adapterkit.contract.codec import Place
from adapterkit.errors import CheckpointError
from adapterkit.points import InjectionPoint


def whole_point(place: Place) -> InjectionPoint:
    """The layer as a point, of which the place's point may be some rows."""
    point = place.point
    width = point.in_features if place.columns is None else place.shape[1] * point.layout.groups
    return dataclasses.replace(point, span=None, in_span=None, out_features=place.shape[0], in_features=width)


def whole_base(place: Place, where: object) -> tuple[Tensor, Tensor | None]:
    """The weight of the layer, [out, in / groups, *kernel], and its bias.

    Raises:
        CheckpointError: No model is at hand.
    """
    if place.model is None:
        raise CheckpointError("the model is needed, for what its own weight is there", where, place.point.path)
    return place.model.values(whole_point(place))
