"""The points of a model, with the model behind them, as the tools take them."""

from __future__ import annotations

from adapterkit.handle.view import seen
from adapterkit.mapping.model import map_model
from adapterkit.points import Points


def points_of(model: object, backend: str | None = None) -> Points:
    """The points of a model or pipeline; `points.model` reads its weights. Nothing is changed.

    Args:
        model: A torch module or a diffusers pipeline; one on the meta device has points too.
        backend: A backend's name, to override the match by class.

    Raises:
        UnsupportedModelError: No backend knows the model.
    """
    return seen(map_model(model, backend))
