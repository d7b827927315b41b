"""Learnt factors in (0, 1) on the effects of a union's parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapterkit.errors import IncompatibleTargetError
from adapterkit.points import AttentionPoint, InjectionPoint


class TokenGate(nn.Module):
    """`sigmoid(w . y + b)` for every token, from the base's output y [..., features]; it starts at 1/2."""

    def __init__(self, features: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.weight, self.bias = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(()))

    def forward(self, y: Tensor) -> Tensor:
        """The gate, with one entry where y has features."""
        moved = y.movedim(self.axis, -1)
        gate = torch.sigmoid(moved @ self.weight.to(y.dtype) + self.bias.to(y.dtype))
        return gate.unsqueeze(-1).movedim(-1, self.axis)


class SequenceGate(nn.Module):
    """`mean_t sigmoid(w . x_t + b)` for every sample, from the point's input x [batch, length, features]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The gate, [batch, 1, 1]."""
        return torch.sigmoid(x @ self.weight.to(x.dtype) + self.bias.to(x.dtype)).mean(1)[:, None, None]


class FixedGate(nn.Module):
    """One learnt factor, `sigmoid(b)`, where there is no output to look at: at attention points."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, y: Tensor) -> Tensor:
        """The factor, in y's dtype."""
        return torch.sigmoid(self.bias).to(y.dtype)


def gate_at(point: InjectionPoint, gating: bool | str) -> nn.Module:
    """The gate of one part's effect at a point.

    Raises:
        IncompatibleTargetError: A gate over the sequence, where there is none.
    """
    if gating == "sequence":
        if not point.is_linear:
            told = "a gate over the sequence is of layers that are given features in a sequence: set gating=True"
            raise IncompatibleTargetError(f"{point.id}: {told}")
        return SequenceGate(point.in_features)
    if isinstance(point, AttentionPoint) or point.lengthens:
        return FixedGate()
    return TokenGate(point.out_features, point.feature_axis)
