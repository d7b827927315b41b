"""GraLoRA: low-rank adaptation block by block (Jung et al. 2025, arXiv:2505.20355)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_peft_types.ranked import Ranked, Thinned

_MAX_BLOCKS, _MAX_WHOLE, _MAX_SCALE = 2**8, 2**16, 1e4


class GraLoRAModule(Thinned):
    """The weight as k x k blocks, each with an update of rank r / k of its own, and one of rank h for them all.

    A [k, in / k, r] has the columns of k groups, of which group n gives its part o of r / k numbers to row o of blocks;
    B [k, r, out / k] makes features from what a row of blocks is given. `A_whole` [h, in] and `B_whole` [out, h] are as
    in LoRA. Kernels of convolutions count as inputs of their channel.

    Args:
        point: Where.
        rank: r, a multiple of k.
        blocks: k.
        whole: h.
        scale: On all of the update.
        dropout: Of the input, in training.
    """

    def __init__(
        self, point: ak.InjectionPoint, rank: int, blocks: int, whole: int, scale: float, dropout: float
    ) -> None:
        super().__init__(point, dropout)
        out, *self.rest = point.shape
        width = math.prod(self.rest)
        self.scale, self.blocks = scale, blocks
        a = torch.empty(blocks, rank, width // blocks)
        for block in a:
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        self.A, self.B = nn.Parameter(a.mT.contiguous()), nn.Parameter(torch.zeros(blocks, rank, out // blocks))
        self.A_whole = nn.Parameter(torch.empty(whole, width)) if whole else None
        self.B_whole = nn.Parameter(torch.zeros(out, whole)) if whole else None
        if self.A_whole is not None:
            nn.init.kaiming_uniform_(self.A_whole, a=math.sqrt(5))

    def product(self) -> ak.Factors:
        """The update, dropout aside."""
        a, b = widened(self.A, self.B)
        if self.A_whole is not None and self.B_whole is not None:
            a, b = torch.cat([a, self.A_whole]), torch.cat([b, self.B_whole], dim=1)
        return ak.Factors(a.unflatten(1, self.rest), b, self.layout, self.scale)

    def delta(self, x: Tensor) -> Tensor:
        if self.layout.form not in ("linear", "linear_t"):
            return super().delta(x)
        x = self.thinned(x)
        k, a, b = self.blocks, self.A.to(x.dtype), self.B.to(x.dtype)
        h = torch.einsum("...ni,nir->...nr", x.unflatten(-1, (k, -1)), a)
        h = h.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)
        y = torch.einsum("...or,orj->...oj", h, b).flatten(-2)
        if self.A_whole is not None and self.B_whole is not None:
            y = y + nn.functional.linear(nn.functional.linear(x, self.A_whole.to(x.dtype)), self.B_whole.to(x.dtype))
        return y * self.scale


def widened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`A` and `B` of `GraLoRAModule` as factors of the whole weight, [k r, in] and [out, k r].

    Each block of columns, and of rows, meets a k-th of their ranks.
    """
    k = len(a)
    identity = torch.eye(k, dtype=a.dtype, device=a.device)
    wide_a = torch.einsum("nior,nm->onrmi", a.unflatten(-1, (k, -1)), identity).flatten(3).flatten(0, 2)
    wide_b = torch.einsum("onrj,op->pjonr", b.unflatten(1, (k, -1)), identity).flatten(2).flatten(0, 1)
    return wide_a, wide_b


@dataclass(frozen=True)
class GraLoRA(Ranked):
    """`W + alpha / (rank + whole) (blocks of low rank + B A)`: LoRA's parameters, and `blocks` times its rank.

    Attributes:
        rank: r of all blocks in a row together, a multiple of `blocks`.
        blocks: k; it divides inputs and outputs.
        whole: Rank of a LoRA beside them (Hybrid GraLoRA); 0 for none.
        alpha: None means rank + whole, so that the update is scaled by 1.
    """

    rank: int = 32
    blocks: int = 2
    whole: int = 0
    alpha: float | None = None

    @property
    def scale(self) -> float:
        """The factor on the update."""
        return 1.0 if self.alpha is None else self.alpha / (self.rank + self.whole)

    def problems(self) -> list[str]:
        found = super().problems()
        if not 1 <= self.blocks <= _MAX_BLOCKS:
            found.append(f"blocks must be from 1 to {_MAX_BLOCKS}, not {self.blocks!r}")
        elif self.rank % self.blocks:
            found.append(f"rank must be a multiple of blocks={self.blocks}, not {self.rank!r}")
        if not 0 <= self.whole <= _MAX_WHOLE:
            found.append(f"whole must be from 0 to {_MAX_WHOLE}, not {self.whole!r}")
        if not found and abs(self.scale) > _MAX_SCALE:
            found.append(f"alpha / (rank + whole) must be within {_MAX_SCALE:g}, not {self.scale:g}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.kind == "weight" and (point.shape[0] % self.blocks or point.shape[1] % self.blocks):
            return f"it is {point.shape[0]} x {point.shape[1]}, which blocks={self.blocks} does not divide"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> GraLoRAModule:
        return GraLoRAModule(point, self.rank, self.blocks, self.whole, self.scale, self.dropout)
