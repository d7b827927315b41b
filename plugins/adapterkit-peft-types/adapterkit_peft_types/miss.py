"""MiSS: shards of a weight share one update; Bone before it (Kang and Yin 2024, arXiv:2409.15371)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.kernels import low_rank
from adapterkit.points import Kind

_FORMS = ("shared", "mini", "bat")
_MAX_RANK = 2**14


class SharedShards(ak.AdditiveModule):
    """`W + D`: all shards of r inputs have the same update, `D[o, i] = block[i mod r, o]`.

    `block` is [r, out], or [r, m] for outputs that share theirs: `block[i mod r, o mod m]`.
    """

    def __init__(self, point: ak.InjectionPoint, rank: int, rows: int, dropout: float) -> None:
        super().__init__()
        self.shape, self.layout, self.linear = point.shape, point.layout, point.is_linear
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.block = nn.Parameter(torch.zeros(rank, rows))

    def product(self) -> ak.Factors:
        """What adds up the inputs of all shards [r, in / groups, *kernel], and the block [out, r]."""
        rank = self.block.shape[0]
        width = math.prod(self.shape[1:])
        shard = torch.eye(rank, dtype=self.block.dtype, device=self.block.device)
        sums = shard.repeat(1, -(-width // rank))[:, :width]
        return ak.Factors(sums.reshape(rank, *self.shape[1:]), self._rows(), self.layout)

    def _rows(self) -> Tensor:
        return self.block.mT.repeat(self.shape[0] // self.block.shape[1], 1)

    def factors(self) -> ak.Factors | None:
        return None if self.training and isinstance(self.dropout, nn.Dropout) else self.product()

    def delta(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        if not self.linear:
            return low_rank.update(x, self.product())
        rank = self.block.shape[0]
        whole = F.pad(x, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank))
        return F.linear(whole.sum(-2), self._rows().to(x.dtype))

    def delta_weight(self) -> Tensor:
        return low_rank.dense(self.product())


class MovedBlocks(ak.AdapterModule):
    """`W (I + B) + B` in blocks [r, r], B the same for all blocks of a row: `block` is [out / r, r, r]."""

    def __init__(self, point: ak.InjectionPoint, rank: int) -> None:
        super().__init__()
        self.block = nn.Parameter(torch.zeros(point.shape[0] // rank, rank, rank))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        block = self.block.to(weight.dtype)
        rank = block.shape[-1]
        tiles = weight.flatten(1).unflatten(1, (-1, rank)).unflatten(0, (-1, rank))  # [out / r, r, in / r, r]
        moved = torch.einsum("orik,oks->oris", tiles, block) + block.unsqueeze(2)
        return weight + moved.reshape(weight.shape), bias


@dataclass(frozen=True)
class MiSS(ak.AdapterConfig):
    """One small update for all shards of a weight: rank * out numbers, and an update of that rank.

    Attributes:
        rank: Inputs in a shard.
        form: "shared" adds the update (Bone); in "mini" outputs share theirs too; in "bat" it depends on the weight.
        mini: In the form "mini", number of outputs that have numbers of their own; it divides the point's outputs.
        dropout: Probability of zeroing an element of the input in training; not in the form "bat".
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    forms: ClassVar[frozenset[str] | None] = frozenset({"linear", "linear_t", "conv"})
    targets: str = "attention"
    rank: int = 64
    form: str = "shared"
    mini: int = 1
    dropout: float = 0.0

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}")
        if self.form not in _FORMS:
            found.append(f"form must be one of {', '.join(_FORMS)}, not {self.form!r}")
        if self.mini < 1:
            found.append(f"mini must be at least 1, not {self.mini!r}")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be at least 0 and less than 1, not {self.dropout!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if reason := super().accepts(point):
            return reason
        if point.cuts_groups:
            return "MiSS acts on whole grouped convolutions"
        out, width = point.shape[0], math.prod(point.shape[1:])
        if self.rank > width:
            return f"it has {width} inputs, fewer than rank {self.rank}"
        if self.form == "mini" and out % self.mini:
            return f"mini {self.mini} does not divide its {out} outputs"
        if self.form == "bat" and (out % self.rank or width % self.rank):
            return f"rank {self.rank} does not divide both its {out} outputs and its {width} inputs, as form 'bat' asks"
        if point.is_read and self.dropout and self.form != "bat":
            return "the model reads this weight, whose input dropout cannot reach: set dropout=0 here"
        return None

    def alike(self, point: ak.InjectionPoint) -> tuple[Hashable, ...]:
        return (point.shape, point.layout, self.rank, self.form, self.mini, self.dropout)

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        if self.form == "bat":
            return MovedBlocks(point, self.rank)
        rows = self.mini if self.form == "mini" else point.out_features
        return SharedShards(point, self.rank, rows, self.dropout)
