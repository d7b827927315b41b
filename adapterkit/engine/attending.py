"""Attentions of adapters beside the softmax of an attention point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.adapter import AdapterModule, Base
from adapterkit.backend import Projection
from adapterkit.contract.abilities import Abilities
from adapterkit.engine.context import Side
from adapterkit.engine.switch import NOTHING, Switch
from adapterkit.errors import AttachError, PluginError
from adapterkit.kernels.spans import read_span
from adapterkit.kernels.weights import base_weight, call_weight

Projections = tuple[Projection, Projection]


class Attended:
    """The base at an attention point: an attention that has run. See `adapterkit.adapter.Attention`.

    Args:
        query, keys, values, output, scale: As in `adapterkit.backend.Extension.attend`.
        switch: The model's.
        side: The side inputs.
        projections: The model's own layers for keys and for values, where an adapter asks for them.
    """

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        scale: float | None,
        switch: Switch,
        side: Side,
        projections: Projections | None,
    ) -> None:
        self.keys, self.values = keys, values
        self._query, self._output, self._scale = query, output, scale
        self._switch, self._side, self._projections = switch, side, projections

    def __call__(self, x: Tensor, /) -> Tensor:
        if x is not self._query:
            raise ValueError("at an attention point base(query) can only be asked for the query that attend was given")
        return self._output

    @property
    def context(self) -> Mapping[str, Tensor]:
        return self._side(self._query)

    def mix(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = (_for_heads(part.to(query.dtype), query) for part in (keys, values))
        return F.scaled_dot_product_attention(query, keys, values, scale=self._scale)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self._projections is None:
            raise AttachError(
                "the layers that make this attention's keys and values are not known, and base.project needs them: "
                "let the type's `accepts` refuse points whose layout has no `source`"
            )
        tokens = tokens.to(self._query.dtype)
        keys, values = (_projected(one, tokens, self._switch) for one in self._projections)
        return keys, values


class Attending:
    """An adapter that attends, as one that acts."""

    abilities: Abilities = Abilities()
    parts: tuple[str, ...] = ()

    def __init__(self, module: AdapterModule) -> None:
        self.module, self.scalable, self.outermost = module, module.scalable, module.outermost

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.module.parameters()

    def __call__(self, x: Tensor, base: Base, /) -> Tensor:
        attention: Attended = base  # type: ignore[assignment]
        y = base(x)
        attended = self.module.attend(x, attention.keys, attention.values, attention)
        if attended.shape != y.shape:
            raise PluginError(
                f"{type(self.module).__name__}.attend at {self.module.at} gave {tuple(attended.shape)}, and the "
                f"attention {tuple(y.shape)}"
            )
        return attended.to(y.dtype)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Not asked."""
        raise NotImplementedError

    def lengthen(self, tokens: Tensor) -> Tensor:
        """Not asked."""
        raise NotImplementedError

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.module.merged(weight, bias)


def _for_heads(part: Tensor, query: Tensor) -> Tensor:
    """Keys or values, one for every row and head of the queries."""
    batch, heads = query.shape[:2]
    part = part.expand(batch, *part.shape[-3:])
    return part if part.shape[1] == heads else part.repeat_interleave(heads // part.shape[1], dim=1)


def _projected(projection: Projection, tokens: Tensor, switch: Switch) -> Tensor:
    """What a frozen layer makes of tokens [..., length, features]: [..., heads, length, width]."""
    return _frozen(projection, tokens, switch).unflatten(-1, (projection.heads, -1)).transpose(-3, -2)


def _frozen(projection: Projection, tokens: Tensor, switch: Switch) -> Tensor:
    module, point = projection.module, projection.point
    if point.is_read:  # the module is no layer: it holds the parameter
        weight, bias = base_weight(module, point)
        if weight is None:
            raise AttachError(f"there is no dense weight at {point.id} to project with")
        return call_weight(tokens, weight, bias, point.layout)
    with switch.overridden(NOTHING):
        y = module.forward(tokens)
    return y if point.span is None else read_span(y, point.span, -1)
