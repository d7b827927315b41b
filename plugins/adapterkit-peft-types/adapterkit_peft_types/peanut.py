"""PEANuT: a small network makes the update from the weight itself (Zhong et al. 2024, arXiv:2410.01870)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapters.bottleneck import ACTIVATIONS
from adapterkit.errors import did_you_mean
from adapterkit.points import Kind

_MAX_RANK, _MAX_DEPTH, _MAX_SCALE = 2**14, 64, 1e4


class PEANuTModule(ak.AdapterModule):
    """`W^T + scale B net(f(W^T A))^T`: a row of features for each input, from A [rank, out] to B [out, rank].

    The network has `encoders` and `decoders` [depth, rank, rank], each with an activation f behind; what enters encoder
    i is added to what leaves the decoder that is as far from the end.
    """

    def __init__(self, point: ak.InjectionPoint, config: PEANuT) -> None:
        super().__init__()
        out, rank, depth = point.shape[0], config.rank, config.depth
        self.activation, self.scale = config.activation, config.scale
        self.A, self.B = nn.Parameter(torch.empty(rank, out)), nn.Parameter(torch.zeros(out, rank))
        self.encoders = nn.Parameter(torch.empty(depth, rank, rank)) if depth else None
        self.decoders = nn.Parameter(torch.empty(depth, rank, rank)) if depth else None
        for many in (self.A[None], self.encoders, self.decoders):
            for matrix in () if many is None else many.data:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def update(self, weight: Tensor) -> Tensor:
        """What is added to a weight [out, in / groups, *kernel]."""
        act = ACTIVATIONS[self.activation]
        kept: list[Tensor] = []
        h = act(weight.flatten(1).mT @ self.A.to(weight.dtype).mT)
        if self.encoders is not None and self.decoders is not None:
            for encoder in self.encoders.to(weight.dtype):
                kept.append(h)
                h = act(h @ encoder.mT)
            for decoder in self.decoders.to(weight.dtype):
                h = act(h @ decoder.mT) + kept.pop()
        return (self.scale * (h @ self.B.to(weight.dtype).mT).mT).view(weight.shape)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.update(weight), bias


@dataclass(frozen=True)
class PEANuT(ak.AdapterConfig):
    """`W + scale net(W)`: the update is a function of the weight, of as high a rank as it needs to be.

    Attributes:
        rank: Width of the network.
        depth: Encoders, and decoders; 0 for none between A and B.
        activation: As of `Bottleneck`.
        scale: Factor on the update.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    rank: int = 32
    depth: int = 0
    activation: str = "relu"
    scale: float = 1.0

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}")
        if not 0 <= self.depth <= _MAX_DEPTH:
            found.append(f"depth must be from 0 to {_MAX_DEPTH}, not {self.depth!r}")
        if self.activation not in ACTIVATIONS:
            near = did_you_mean(self.activation, ACTIVATIONS)
            found.append(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}.{near}")
        if abs(self.scale) > _MAX_SCALE:
            found.append(f"scale must be within {_MAX_SCALE:g}, not {self.scale!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        return "PEANuT acts on whole grouped convolutions" if point.cuts_groups else super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> PEANuTModule:
        return PEANuTModule(point, self)
