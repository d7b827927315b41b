"""A small right adapter type, and how to break it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak


class Good(ak.AdditiveModule):
    """Adds a learnt number to every feature."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(point.out_features))

    def delta(self, x: Tensor) -> Tensor:
        return self.shift.expand(*x.shape[:-1], -1)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shift = self.shift.to(weight.dtype)
        return weight, shift if bias is None else bias + shift


class Sided(ak.AdapterModule):
    """Adds a learnt number to every feature, as much of it as the row's side input says."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(point.out_features))

    def forward(self, x: Tensor, base: Any) -> Tensor:
        return self.shifted(x, base, base.context["side"])

    def shifted(self, x: Tensor, base: Any, side: Tensor) -> Tensor:
        y = base(x)
        return y + self.shift.to(y.dtype) * side.to(y.dtype).view(-1, *[1] * (y.ndim - 1))


def side(config: Any, points: Any, rows: int) -> dict[str, Tensor]:
    return {"side": torch.randn(rows)}


class Attends(ak.AdapterModule):
    """Adds a learnt number to every head of an attention."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(point.layout.kv_heads))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, base: Any) -> Tensor:
        y = base(query)
        return y + self.shift.to(y.dtype)[:, None, None]


@dataclass(frozen=True)
class Shift(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "attn.* mlp.up"
    amount: int = 1

    module = Good

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        layout: Any = point.layout
        linear = point.kind != "weight" or (layout.form == "linear" and not point.is_read and not point.in_span)
        return super().accepts(point) if linear else "only linear layers"

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        return self.module(point)


def broken(**members: Any) -> ak.AdapterConfig:
    """A `Shift` with other members, such as another `module`."""
    cls = dataclass(frozen=True)(type("Broken", (Shift,), {"__module__": __name__, **members}))
    return cls()
