"""OFT as PEFT has it: what a layer takes is rotated in blocks (Qiu et al. 2025, arXiv:2506.19847)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit.errors import NotMergeableError
from adapterkit.points import Kind

_MAX_BLOCK, _MAX_TERMS = 2**12, 64


class InputOFTModule(ak.AdapterModule):
    """`W (R x) + b`, R of blocks; of an embedding what it gives is rotated, and of a convolution its patches.

    `weight` [blocks, block * (block - 1) / 2] has the upper triangles of skew matrices. Patches are taken without
    padding, rotated, and dealt out and added up as PEFT does it: no weight would do that, and it has an effect from the
    start.
    """

    def __init__(self, point: ak.InjectionPoint, config: InputOFT) -> None:
        super().__init__()
        self.layout, self.axis = point.layout, point.feature_axis
        self.terms, self.bound = config.terms, config.constraint
        self.features, self.block = _features(point), config.block
        self.patches = any(size > 1 for size in point.shape[2:])
        blocks = 1 if config.shared_blocks else self.features // self.block
        self.weight = nn.Parameter(torch.zeros(blocks, self.block * (self.block - 1) // 2))
        rows, columns = torch.triu_indices(self.block, self.block, 1)
        self.register_buffer("places", rows * self.block + columns, persistent=False)

    def rotations(self) -> Tensor:
        """The blocks [blocks, block, block] of what rows of features are multiplied with."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))  # as solving asks
        places: Tensor = self.places  # type: ignore[assignment]
        flat = weight.new_zeros(len(weight), self.block**2).index_copy(1, places, weight)
        skew = flat.unflatten(1, (self.block, self.block))
        skew = skew - skew.mT
        if self.bound is not None:
            norm, bound = skew.flatten(1).norm(dim=1)[:, None, None], self.bound / math.sqrt(len(skew))
            skew = torch.where(norm > bound, skew * (bound / norm.clamp_min(1e-30)), skew)
        found = _neumann(skew, self.terms) if self.terms is not None else _cayley(skew)
        return found.expand(self.features // self.block, -1, -1)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.layout.form == "embedding":
            return self._turned(base(x))
        if self.patches:
            return base(self._folded(x))
        return base(self._turned(x.movedim(self.axis, -1)).movedim(-1, self.axis))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`: columns are turned; of an embedding, [out, in], rows."""
        if self.patches:
            raise NotMergeableError("patches that are rotated and added up have no equivalent weight")
        if self.layout.form == "embedding":
            return self._turned(weight.mT).mT, bias
        blocks = weight.flatten(1).unflatten(1, (-1, self.block))
        turned = torch.einsum("orc,rkc->ork", blocks, self.rotations().to(weight.dtype))
        return turned.reshape(weight.shape), bias

    def _turned(self, features: Tensor) -> Tensor:
        blocks = features.unflatten(-1, (-1, self.block))
        return torch.einsum("...rk,rkc->...rc", blocks, self.rotations().to(features.dtype)).flatten(-2)

    def _folded(self, x: Tensor) -> Tensor:
        kernel = self.layout.kernel
        whole = x if x.ndim == 4 else x[None]
        turned = self._turned(F.unfold(whole, kernel).mT)  # [batch, patches, channels * kernel]
        # PEFT adds them up in this order, which mixes places and kernel.
        dealt = turned.unflatten(-1, (whole.shape[1], -1)).transpose(1, 2).reshape(len(whole), turned.shape[2], -1)
        folded = F.fold(dealt, (whole.shape[-2], whole.shape[-1]), kernel)
        return folded if x.ndim == 4 else folded[0]


def _neumann(q: Tensor, terms: int) -> Tensor:
    """`I + 2 Q + 2 Q^2 + ... + Q^n`: about Cayley's transform of -Q, as PEFT adds it up."""
    found = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    if terms < 2:
        return found
    found = found + 2 * q
    if terms < 3:
        return found
    power = q @ q
    found = found + 2 * power
    for _ in range(3, terms - 1):
        power = power @ q
        found = found + 2 * power
    return found + power @ q


def _cayley(q: Tensor) -> Tensor:
    """`(I - Q) (I + Q)^-1`."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(identity + q, identity - q, left=False)


def _features(point: ak.InjectionPoint) -> int:
    """How many features are rotated."""
    return point.out_features if point.form == "embedding" else point.in_features * math.prod(point.shape[2:])


@dataclass(frozen=True)
class InputOFT(ak.AdapterConfig):
    """`W R`: a layer's inputs are rotated in blocks. No effect at first.

    Attributes:
        block: Features in a block; it divides the inputs (of a convolution those of a patch).
        terms: R by so many terms of a series, which is nearly orthogonal and quick; None for an orthogonal one.
        constraint: Bound on the norm of the generators of a layer (COFT).
        shared_blocks: Whether all blocks of a layer turn alike.
        patches: Whether convolutions with a kernel are taken too, as PEFT takes them: with an effect from the start.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    block: int = 32
    terms: int | None = 5
    constraint: float | None = None
    shared_blocks: bool = False
    patches: bool = False

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        """Whether no patches are rotated."""
        return not self.patches

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.block <= _MAX_BLOCK:
            found.append(f"block must be from 1 to {_MAX_BLOCK}, not {self.block!r}")
        if self.terms is not None and not 1 <= self.terms <= _MAX_TERMS:
            found.append(f"terms must be None or from 1 to {_MAX_TERMS}, not {self.terms!r}")
        if self.constraint is not None and not self.constraint > 0:
            found.append(f"constraint must be None or more than 0, not {self.constraint!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if reason := super().accepts(point):
            return reason
        if point.layout.groups > 1:
            return "it rotates one input for all rows, and a grouped convolution has several"
        if any(size > 1 for size in point.shape[2:]) and (len(point.shape) != 4 or {*point.layout.dilation} != {1}):
            return "patches are rotated of 2d convolutions without dilation"
        if any(size > 1 for size in point.shape[2:]) and not self.patches:
            return "a convolution's patches would be added up where they lie over each other: patches=True wants that"
        if any(size > 1 for size in point.shape[2:]) and point.is_read:
            return "the model reads this weight, and patches that are rotated have no equivalent weight"
        if point.form == "embedding" and point.span is not None:
            return "it rotates all that an embedding gives"
        if _features(point) % self.block:
            return f"block is {self.block}, which does not divide its {_features(point)} features"
        return None

    def build(self, point: ak.InjectionPoint) -> InputOFTModule:
        return InputOFTModule(point, self)
