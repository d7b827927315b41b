"""What a new adapter may start from: values of the frozen base at its point."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from adapterkit.adapter import AdapterModule
from adapterkit.errors import IncompatibleTargetError
from adapterkit.handle.sharding import gathered
from adapterkit.kernels.weights import base_weight, wide_dtype
from adapterkit.mapping import offload_hooks
from adapterkit.mapping.model import MappedModel
from adapterkit.points import InjectionPoint, ParameterPoint, TokensPoint, WeightPoint

_EMBEDDING = ("embed.tokens", "embedding")

Values = tuple[Tensor, Tensor | None]
"""The weight and bias that a module is handed, float32 or wider."""


def start_from_base(module: AdapterModule, point: InjectionPoint, mapped: MappedModel) -> None:
    """Hands a new module the base's values, where its type takes start values from them.

    Raises:
        IncompatibleTargetError: It does, and there are none.
    """
    if not module.abilities.initialise or not module.from_base:
        return
    with torch.no_grad():
        values = base_values(type(module).__name__, point, mapped)
        if values is not None:
            module.initialise(*values)


def base_values(taker: str, point: InjectionPoint, mapped: MappedModel) -> Values | None:
    """The base's values at a point; see `AdapterModule.initialise`. None where no kind of them is there, or on meta.

    Args:
        taker: Who takes them, for errors.
        point: Where.
        mapped: The model.

    Raises:
        IncompatibleTargetError: There is no dense floating-point weight, or the model embeds no such tokens.
    """
    source, scale = point, 1.0
    if isinstance(point, TokensPoint):
        source = _embedding(taker, point, mapped)
        scale = source.layout.scale
    elif not isinstance(point, ParameterPoint):
        return None
    with offload_hooks.as_computed(mapped.root(source), source.path):
        weight, bias = base_weight(mapped.module(source), source)
    if weight is None or not weight.is_floating_point():
        raise IncompatibleTargetError(
            f"{taker} takes its start values from the weight at {source.id}, "
            "and there is no dense floating-point weight there (a quantized layer?)"
        )
    if weight.is_meta:
        return None
    wide = wide_dtype(weight.dtype)
    weight, bias = gathered(weight).to(wide), None if bias is None else gathered(bias).to(wide)
    return scale * weight if scale != 1.0 else weight, bias


def _embedding(taker: str, point: InjectionPoint, mapped: MappedModel) -> WeightPoint:
    """The token embedding whose rows are like those of the sequence at a `tokens` point: the nearest in the tree."""
    beside = [one for one in mapped.points() if one.component == point.component and isinstance(one, WeightPoint)]
    found = [one for one in beside if (one.role, one.form, one.out_features) == (*_EMBEDDING, point.out_features)]
    if not found:
        raise IncompatibleTargetError(
            f"{taker} takes its start values from the token embedding, and {mapped.label} has none with "
            f"{point.out_features} features for {point.id}"
        )
    return max(found, key=lambda one: _common(one.path, point.path))


def _common(one: str, other: str) -> int:
    """How many names two paths have in common from the left."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
