"""GLoRA, element by element: a weight and a bias are scaled and shifted (Chavan et al. 2023, arXiv:2306.07967)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import did_you_mean
from adapterkit.points import Kind

_MAX_RANK = 2**16
_PATHS = {
    "weight": ("low_rank", "rows", "constant", "none"),
    "coupling": ("low_rank", "columns", "none"),
    "bias": ("rows", "constant", "none"),
}
"""The fields of `ElementwiseGLoRA`, with what each can be."""


class LowRankPath(nn.Module):
    """`down up`: down [out, rank] starts at zero, up [rank, in]."""

    def __init__(self, out: int, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.zeros(out, rank)), nn.Parameter(torch.empty(rank, width))
        nn.init.kaiming_uniform_(self.up, a=math.sqrt(5))

    def forward(self) -> Tensor:
        return self.down @ self.up


class ValuePath(nn.Module):
    """Numbers that start at zero."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(shape))

    def forward(self) -> Tensor:
        return self.value


class ElementwiseGLoRAModule(ak.AdapterModule):
    """`W + W * A + B` and `b + b * D + E + W C`; each of A to E is one of the paths, or None."""

    def __init__(self, point: ak.InjectionPoint, config: ElementwiseGLoRA) -> None:
        super().__init__()
        out, width = point.shape[0], math.prod(point.shape[1:])
        coupling, bias = (config.coupling, config.bias) if point.layout.bias else ("none", "none")
        matrix, vector = {"rows": (out, 1), "constant": (1,)}, {"rows": (out,), "constant": (1,)}
        self.A, self.B = (_path(config.weight, matrix, out, width, config.rank) for _ in "AB")
        self.C = _path(coupling, {"columns": (width, 1)}, width, 1, config.rank)
        self.D, self.E = (_path(bias, vector, out, 1, config.rank) for _ in "DE")

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`."""
        matrix, total = weight.flatten(1), weight.flatten(1)
        if self.A is not None and self.B is not None:
            total = total + matrix * self.A().to(weight.dtype) + self.B().to(weight.dtype)
        own = bias
        if bias is not None and self.C is not None:
            own = bias + (matrix @ self.C().to(weight.dtype)).squeeze(1)
        if bias is not None and own is not None and self.D is not None and self.E is not None:
            own = own + bias * self.D().to(bias.dtype) + self.E().to(bias.dtype)
        return total.view(weight.shape), own


def _path(kind: str, shapes: dict[str, tuple[int, ...]], out: int, width: int, rank: int) -> nn.Module | None:
    if kind == "none":
        return None
    return LowRankPath(out, width, rank) if kind == "low_rank" else ValuePath(shapes[kind])


@dataclass(frozen=True)
class ElementwiseGLoRA(ak.AdapterConfig):
    """`W + W * A + B` and `b + b * D + E + W C`, with products of elements; the last two where there is a bias.

    The paper's A is a factor of W as a matrix; a product of elements is what PEFT computes.

    Attributes:
        rank: Of the paths that are "low_rank".
        weight: What A and B are: "low_rank", "rows" (a number for each row), "constant" (one number) or "none".
        coupling: What C is: "low_rank", "columns" or "none".
        bias: What D and E are: "rows", "constant" or "none".
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    rank: int = 8
    weight: str = "low_rank"
    coupling: str = "low_rank"
    bias: str = "constant"

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}")
        for name, known in _PATHS.items():
            value = getattr(self, name)
            if value not in known:
                found.append(f"{name} must be one of {', '.join(known)}, not {value!r}.{did_you_mean(value, known)}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.kind != "weight":
            return super().accepts(point)
        if point.cuts_groups:
            return "GLoRA acts on whole grouped convolutions"
        if self.weight == "none" and not (point.layout.bias and {self.coupling, self.bias} != {"none"}):
            return "there is nothing to learn: weight is none, and there is no bias, or nothing of it"
        if point.in_span is not None and point.layout.bias and {self.coupling, self.bias} != {"none"}:
            return "its bias is another point's too: set coupling and bias to none here"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> ElementwiseGLoRAModule:
        return ElementwiseGLoRAModule(point, self)
