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


@dataclass(frozen=True)
class Shift(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "attn.* mlp.up"
    amount: int = 1

    module = Good

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        layout: Any = point.layout
        linear = point.kind != "weight" or (layout.form == "linear" and layout.access == "call" and not point.in_span)
        return super().accepts(point) if linear else "only linear layers"

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        return self.module(point)


def broken(**members: Any) -> ak.AdapterConfig:
    """A `Shift` with other members, such as another `module`."""
    cls = dataclass(frozen=True)(type("Broken", (Shift,), {"__module__": __name__, **members}))
    return cls()
