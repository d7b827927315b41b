"""Orthogonal fine-tuning: a weight's rows, or its columns, are rotated, which keeps their lengths and angles.

Sources: OFT, Qiu et al. 2023 (arXiv:2306.07280); BOFT, Liu et al. 2024 (arXiv:2311.06243).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base, WeightBase
from adapterkit.points import Kind, WeightPoint

_MAX_BLOCK = 2**12


class RotationModule(ak.AdapterModule):
    """`R (W x) + b`, or `W (R x) + b`: features are rotated in blocks, once for each factor.

    The first factor stands next to the weight: R is `R_m ... R_1`, and on the other side `R_1 ... R_m`.

    Args:
        point: Where.
        block: b, features in a block.
        factors: m; a block of factor i is made of two half blocks that lie 2^(i - 1) half blocks apart (a butterfly).
        bound: Of the norm of each block's generator, or of all of them together; None for none.
        together: Whether it is of all of them.
        rescale: Whether every row has a factor too, `rescale` [out], which starts at 1.
        inputs: Whether what the layer takes is rotated, instead of what it gives (less its bias).
    """

    def __init__(
        self,
        point: ak.InjectionPoint,
        block: int,
        factors: int,
        bound: float | None,
        rescale: bool,
        inputs: bool,
        together: bool = False,
    ) -> None:
        super().__init__()
        self.axis, self.bound, self.inputs, self.together = point.feature_axis, bound, inputs, together
        features = point.in_features if inputs else point.out_features
        self.oft_blocks = nn.Parameter(torch.zeros(factors, features // block, block, block))
        self.rescale = nn.Parameter(torch.ones(point.out_features)) if rescale else None

    def rotations(self) -> Tensor:
        """R of every factor and block, [m, count, b, b], by Cayley's transform of the skew part of the parameters."""
        blocks = self.oft_blocks.to(torch.promote_types(self.oft_blocks.dtype, torch.float32))  # as solving asks
        q = blocks - blocks.mT
        if self.bound is not None:
            norm = q.norm() if self.together else q.flatten(-2).norm(dim=-1)[..., None, None]
            q = q * torch.where(norm > self.bound, self.bound / norm.clamp_min(1e-12), torch.ones_like(norm))
        identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        return torch.linalg.solve(identity - q, identity + q)

    def turned(self, features: Tensor) -> Tensor:
        """The rotations of features that a weight gives, [..., out], its first factor first."""
        for i, rotation in enumerate(self.rotations().to(features.dtype)):
            features = _turned(features, rotation, i)
        return features

    def turned_before(self, features: Tensor) -> Tensor:
        """The rotations of features that a weight takes, [..., in], its first factor last."""
        for i, rotation in reversed([*enumerate(self.rotations().to(features.dtype))]):
            features = _turned(features, rotation, i)
        return features

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.inputs:
            x = self.turned_before(x.movedim(self.axis, -1)).movedim(-1, self.axis)
            if self.rescale is None:
                return base(x)
        y, bias = base(x).movedim(self.axis, -1), cast("WeightBase", base).bias
        y = self._rescaled(y if bias is None else y - bias)
        return (y if bias is None else y + bias).movedim(-1, self.axis)

    def _rescaled(self, y: Tensor) -> Tensor:
        y = y if self.inputs else self.turned(y)
        return y if self.rescale is None else y * self.rescale.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`: the bias is not rotated."""
        if self.inputs:
            weight = self._transposed(weight.movedim(1, -1)).movedim(-1, 1)
        return self._rescaled(weight.movedim(0, -1)).movedim(-1, 0), bias

    def _transposed(self, rows: Tensor) -> Tensor:
        for i, rotation in enumerate(self.rotations().to(rows.dtype)):
            rows = _turned(rows, rotation.mT, i)
        return rows


def _turned(features: Tensor, rotation: Tensor, i: int) -> Tensor:
    """One factor's rotation [count, b, b] of the last axis."""
    block = rotation.shape[-1]
    blocks = _dealt(features, block, (2, 2**i)).unflatten(-1, rotation.shape[:2])
    return _dealt(torch.einsum("...cj,cij->...ci", blocks, rotation).flatten(-2), block, (2**i, 2))


def _dealt(features: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """Half blocks in another order: those that `shape` has in its rows next to each other in its columns."""
    if 1 in shape:
        return features
    return features.unflatten(-1, (-1, *shape, block // 2)).transpose(-3, -2).flatten(-4)


@dataclass(frozen=True)
class OFT(ak.AdapterConfig):
    """`R W`, with R block-diagonal and orthogonal: blocks of rows are rotated; or `W R`. No effect at first.

    Attributes:
        block: Rows in a block, which divide the point's rows. None for the largest divisor up to 8.
        side: "output" rotates rows, as the paper and LyCORIS do, "input" columns, as PEFT does.
        constraint: Bound on how far a block may turn (COFT): of its generator's norm, relative to its size.
        constraint_on: "block", or "layer" for a bound on the norm of all generators of a layer together, relative to
            the features that are rotated, as kohya's scripts and LyCORIS have it.
        rescale: Whether every row has a factor too.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    block: int | None = None
    side: str = "output"
    constraint: float | None = None
    rescale: bool = False
    constraint_on: str = "block"

    @property
    def factors(self) -> int:
        """Number of rotations, one after the other."""
        return 1

    def problems(self) -> list[str]:
        found = []
        if self.block is not None and not 1 <= self.block <= _MAX_BLOCK:
            found.append(f"block must be None or from 1 to {_MAX_BLOCK}, not {self.block!r}")
        if self.side not in ("output", "input"):
            found.append(f"side must be output or input, not {self.side!r}")
        if self.constraint is not None and not self.constraint > 0:
            found.append(f"constraint must be None or more than 0, not {self.constraint!r}")
        if self.constraint_on not in ("block", "layer"):
            found.append(f"constraint_on must be block or layer, not {self.constraint_on!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if not isinstance(point, WeightPoint):
            return super().accepts(point)
        if self.side == "input" and (point.layout.groups > 1 or point.form == "embedding"):
            return "side='input' needs one input for all rows, with features"
        if self.side == "output" and point.in_span is not None:
            return "it rotates all that a projection gives, and this point has a part of its input; use LoRA"
        reach, rows = max(self.block_at(point), 2) * 2 ** (self.factors - 1), self._features(point)
        if rows % reach:
            return f"its {rows} features (of a group) are no multiple of block * 2^(factors - 1) = {reach}"
        return super().accepts(point)

    def block_at(self, point: ak.InjectionPoint) -> int:
        """Rows in a block at a point."""
        rows = self._features(point) // 2 ** (self.factors - 1)
        step = 1 if self.factors == 1 else 2
        return self.block or next((size for size in range(8, 1, -step) if rows % size == 0), 1)

    def _features(self, point: ak.InjectionPoint) -> int:
        """Features that blocks may reach across: of a group."""
        if self.side == "input":
            return point.in_features
        return point.out_features // (point.layout.groups if isinstance(point, WeightPoint) else 1)

    def build(self, point: ak.InjectionPoint) -> RotationModule:
        inputs, together = self.side == "input", self.constraint_on == "layer"
        block, features = self.block_at(point), point.in_features if inputs else point.out_features
        bound = None if self.constraint is None else self.constraint * (features if together else block)
        return RotationModule(point, block, self.factors, bound, self.rescale, inputs, together)


@dataclass(frozen=True)
class BOFT(OFT):
    """OFT in several factors, each of blocks that reach twice as far as those before, so that all rows can meet.

    A block is even: it is made of two halves, which lie apart.

    Attributes:
        butterfly: Number of factors, m.
    """

    butterfly: int = 2

    @property
    def factors(self) -> int:
        return self.butterfly

    def problems(self) -> list[str]:
        found = super().problems()
        if not 1 <= self.butterfly <= 16:
            found.append(f"butterfly must be from 1 to 16, not {self.butterfly!r}")
        if self.butterfly > 1 and self.block is not None and self.block % 2:
            found.append(f"block must be even where butterfly is more than 1, not {self.block!r}")
        return found
