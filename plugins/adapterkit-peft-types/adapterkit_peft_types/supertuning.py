"""Super-Tuning: a weight's entries of the largest size are learnt, and a LoRA beside them (arXiv:2607.09287)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.kernels import low_rank
from adapterkit.points import Kind

_MAX_RANK, _MAX_SCALE = 2**16, 1e4


class SuperTuningModule(ak.AdditiveModule):
    """`W + D + scale B A`: D is zero but for `values` [n] at `indices` [n], counted through the weight row by row."""

    def __init__(self, point: ak.InjectionPoint, config: SuperTuning) -> None:
        super().__init__()
        self.shape, self.largest, self.layout = point.shape, config.largest, point.layout
        count = config.count(point)
        self.values = nn.Parameter(torch.zeros(count))
        self.register_buffer("indices", torch.arange(count, dtype=torch.int32))
        out, *rest = point.shape
        self.scale = config.scale
        self.A = nn.Parameter(torch.empty(config.rank, *rest)) if config.rank else None
        self.B = nn.Parameter(torch.zeros(out, config.rank)) if config.rank else None
        if self.A is not None:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: which entries these are."""
        cast("Tensor", self.indices).copy_(chosen(weight, len(self.values), largest=self.largest))

    def delta_weight(self) -> Tensor:
        dense = torch.zeros(math.prod(self.shape), dtype=self.values.dtype, device=self.values.device)
        sparse = dense.index_put((cast("Tensor", self.indices).long(),), self.values).view(self.shape)
        if self.A is None or self.B is None:
            return sparse
        return sparse + low_rank.dense(ak.Factors(self.A, self.B, self.layout, self.scale)).to(sparse.dtype)


def chosen(weight: Tensor, count: int, *, largest: bool) -> Tensor:
    """The places of a weight's largest (or smallest) entries, by size."""
    return torch.topk(weight.abs().flatten(), count, largest=largest).indices.int()


@dataclass(frozen=True)
class SuperTuning(ak.AdapterConfig):
    """The largest entries of a weight are learnt, as few as `sparsity` leaves; with a LoRA beside them it is Supra.

    Attributes:
        sparsity: Part of the entries that are left alone.
        largest: Whether the largest entries are learnt, or the smallest.
        rank: Of the LoRA; 0 for none.
        alpha: The LoRA is scaled by alpha / rank; None means by 1.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    sparsity: float = 0.99
    largest: bool = True
    rank: int = 0
    alpha: float | None = None

    @property
    def scale(self) -> float:
        """The factor on the LoRA."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    def count(self, point: ak.InjectionPoint) -> int:
        """How many entries are learnt at a point."""
        return int(math.prod(point.shape) * (1 - self.sparsity))

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.sparsity < 1:
            found.append(f"sparsity must be at least 0 and less than 1, not {self.sparsity!r}")
        if not 0 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 0 to {_MAX_RANK}, not {self.rank!r}")
        elif abs(self.scale) > _MAX_SCALE:
            found.append(f"alpha / rank must be within {_MAX_SCALE:g}, not {self.alpha!r} / {self.rank}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.cuts_groups:
            return "SuperTuning acts on whole grouped convolutions"
        if point.kind == "weight" and not self.count(point):
            return (
                f"it has {math.prod(point.shape)} entries, of which sparsity={self.sparsity} leaves none to be learnt"
            )
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> SuperTuningModule:
        return SuperTuningModule(point, self)
