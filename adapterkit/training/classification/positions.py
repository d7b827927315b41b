"""Positions of a transformers classifier, interpolated for good, so that it takes images of that size untold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.training.classifiers import made_for
from adapterkit.training.sizes import Size

_NAMES = ("position_embeddings", "position_embedding")


@contextlib.contextmanager
def made_for_size(model: Any, size: Size) -> Iterator[None]:
    """Inside, weights and config are those of a model for images of that size; as they were afterwards.

    Nothing changes where the model was made for them, or keeps its positions in no way that is known: it then has to be
    called with `interpolate_pos_encoding=True`, as it was trained.
    """
    places = [] if made_for(model) in (None, size) else [*_places(model)]
    if not places:
        yield
        return
    config = getattr(model.config, "vision_config", model.config)
    before = config.image_size
    kept = [(owner, name, getattr(owner, name)) for _, owner, name in places]
    longer = [_interpolated(module, getattr(owner, name), size) for module, owner, name in places]
    try:
        for (_, owner, name), values in zip(places, longer, strict=True):
            setattr(owner, name, nn.Parameter(values, requires_grad=False))
        config.image_size = size[0] if size[0] == size[1] else list(size)
        yield
    finally:
        config.image_size = before
        for owner, name, values in kept:
            setattr(owner, name, values)


def _places(model: nn.Module) -> Iterator[tuple[Any, nn.Module, str]]:
    """What interpolates, and the module and name of the parameter that it interpolates."""
    for module in model.modules():
        if not callable(getattr(module, "interpolate_pos_encoding", None)):
            continue
        for name in _NAMES:
            held = getattr(module, name, None)
            if isinstance(held, nn.Parameter):
                yield module, module, name
            elif isinstance(held, nn.Embedding):
                yield module, held, "weight"


@torch.no_grad()
def _interpolated(module: Any, positions: Tensor, size: Size) -> Tensor:
    nothing = positions.new_empty(1, 0, positions.shape[-1])  # as many patches as there are: surely others
    return (
        module.interpolate_pos_encoding(nothing, *size).reshape(*positions.shape[:-2], -1, positions.shape[-1]).clone()
    )
