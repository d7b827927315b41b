"""A prompt before and after an encoder's embedding: PEFT puts it before positions and norm, adapterkit behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkit.contract.codec import Context, Place
from adapterkit.contract.layouts import WeightLayout
from adapterkit.errors import CheckpointError, UnsupportedFileError, shown
from adapterkit.points import NormPoint, WeightPoint

_POSITIONS, _KINDS, _NORM = "position_embeddings", "token_type_embeddings", "LayerNorm"
_KNOWN = frozenset({"bert"})
_MEAN, _VARIANCE = 1e-4, 1e-3


def is_embedded(place: Place) -> bool:
    """Whether a prompt stands behind the embedding there: the point is the stack of blocks and not the model."""
    return place.point.path.rpartition(".")[2] == "encoder" and "stack" not in place.point.tags


def is_pooled(place: Place) -> bool:
    """Whether the model classifies what is at the first position."""
    model = place.model
    names = () if model is None else model.components[place.point.model].classes
    return any(name.endswith(("ForSequenceClassification", "ForMultipleChoice")) for name in names)


def embedded(prompt: Tensor, place: Place, context: Context) -> Tensor:
    """What the model's embedding makes of vectors [length, features] at its first positions."""
    added, weight, bias, eps = _parts(place, len(prompt), context)
    return F.layer_norm(prompt.to(weight.dtype) + added, weight.shape, weight, bias, eps).to(prompt.dtype)


def unembedded(prompt: Tensor, place: Place, context: Context) -> Tensor:
    """Vectors of which the model's embedding makes these.

    Raises:
        CheckpointError: There are none: a norm gives no such ones.
    """
    added, weight, bias, eps = _parts(place, len(prompt), context)
    normed = (prompt.to(weight.dtype) - bias) / weight
    variance = normed.var(dim=-1, unbiased=False)
    if bool((normed.mean(-1).abs() > _MEAN).any()) or bool(((variance - 1).abs() > _VARIANCE).any()):
        told = "PEFT's prompt goes through the model's embedding, which gives no vectors such as these"
        raise CheckpointError(f"{told}; native holds them", context.where, place.point.id)
    left = (1 - variance).clamp_min(eps * 1e-3)  # what eps has taken
    return (normed * (eps / left).sqrt()[:, None] - added).to(prompt.dtype)


def _parts(place: Place, length: int, context: Context) -> tuple[Tensor, Tensor, Tensor, float]:
    """What is added to the vectors, and the norm's weight, bias and eps, in double."""
    model = place.model
    if model is None:
        raise CheckpointError("a prompt for an encoder is read for a model alone", context.where, place.point.id)
    config: Mapping[str, Any] = model.components[place.point.model].config
    if config.get("model_type") not in _KNOWN:
        told = f"how {shown(config.get('model_type'))} embeds a prompt is not known here"
        raise UnsupportedFileError(f"{told}; known: {', '.join(sorted(_KNOWN))}", context.where, "peft_type")
    around, width = place.point.path.removesuffix("encoder") + "embeddings.", place.point.out_features
    tags = {"component": place.point.model}

    def table(name: str) -> Tensor:
        layout = WeightLayout("embedding")
        point = WeightPoint("embed.pos", around + name, name, 1, width, layout, tags=tags)
        return model.values(point)[0].double().mT

    norm = NormPoint("norm", around + _NORM, _NORM, width, width, WeightLayout("norm", bias=True), tags=tags)
    weight, bias = model.values(norm)
    positions = table(_POSITIONS)
    if length > len(positions):
        raise CheckpointError(f"has {length} positions, and the model {len(positions)}", context.where, place.point.id)
    added = positions[:length] + table(_KINDS)[0]
    zeros = torch.zeros_like(weight)
    return (
        added,
        weight.double(),
        (zeros if bias is None else bias).double(),
        float(config.get("layer_norm_eps", 1e-12)),
    )
