"""TinyLoRA: a few numbers inside of a weight's principal subspace (Morris et al. 2026, arXiv:2602.04118)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_peft_types.ranked import Ranked, Thinned

_MAX_NUMBERS = 2**16


class Vectors(nn.Module):
    """The learnt numbers of all groups, by name.

    Args:
        groups: Point id -> the name of its group.
        numbers: How many a group has.
    """

    def __init__(self, groups: Mapping[str, str], numbers: int) -> None:
        super().__init__()
        self.groups = dict(groups)
        names = dict.fromkeys(self.groups.values())
        self.v = nn.ParameterDict({name: nn.Parameter(torch.zeros(numbers)) for name in names})


class TinyLoRAModule(Thinned):
    """`W + B (sum_i v_i P_i) A`: A and B are W's principal part, P [numbers, rank, rank] is random, v is shared."""

    def __init__(self, point: ak.InjectionPoint, config: TinyLoRA) -> None:
        super().__init__(point, config.dropout)
        out, *rest = point.shape
        rank = min(config.rank, out, math.prod(rest))
        self.register_buffer("A", torch.zeros(rank, *rest))
        self.register_buffer("B", torch.zeros(out, rank))
        self.register_buffer("P", torch.empty(config.numbers, rank, rank).normal_(std=rank**-0.5))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: the largest singular values, half of each in A and in B."""
        u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        a, b = cast("Tensor", self.A), cast("Tensor", self.B)
        root = s[: len(a)].sqrt()
        a.copy_((root[:, None] * vh[: len(a)]).view_as(a))
        b.copy_(u[:, : len(a)] * root)

    def product(self) -> ak.Factors:
        v = self.shared.v[self.shared.groups[self.at]]
        middle = torch.einsum("i,ijk->jk", v, cast("Tensor", self.P).to(v))
        b = cast("Tensor", self.B)
        return ak.Factors(cast("Tensor", self.A), b @ middle.to(b.dtype), self.layout)


@dataclass(frozen=True)
class TinyLoRA(Ranked):
    """LoRA-XS of `numbers` numbers, which layers can share: down to a dozen for a whole model. Files hold A, B and P.

    Attributes:
        rank: Of the subspace; a layer that has fewer directions has as many.
        numbers: Of a group of layers.
        tying: How much layers share: 0 gives each its own numbers, 1 all of them the same.
        group: Name of a point's group, if it is not to come from `tying`.
    """

    common: ClassVar[frozenset[str]] = frozenset({"numbers", "tying"})
    rank: int = 2
    numbers: int = 64
    tying: float = 0.0
    group: str = ""

    def problems(self) -> list[str]:
        found = super().problems()
        if not 1 <= self.numbers <= _MAX_NUMBERS:
            found.append(f"numbers must be from 1 to {_MAX_NUMBERS}, not {self.numbers!r}")
        if not 0 <= self.tying <= 1:
            found.append(f"tying must be from 0 to 1, not {self.tying!r}")
        if self.group and not self.group.replace("_", "").isalnum():
            found.append(f"group must be letters, digits and _, not {self.group!r}")
        return found

    def build(self, point: ak.InjectionPoint) -> TinyLoRAModule:
        return TinyLoRAModule(point, self)

    def shared(self, points: Sequence[ak.InjectionPoint]) -> Vectors:
        groups = {
            point.id: self.at(point).group or group_of(i, len(points), self.tying) for i, point in enumerate(points)
        }
        return Vectors(groups, self.numbers)


def group_of(index: int, count: int, tying: float) -> str:
    """The group of a layer among others: consecutive ones share."""
    groups = max(1, round(count * (1 - tying)))
    return str(min(index // max(1, count // groups), groups - 1))
