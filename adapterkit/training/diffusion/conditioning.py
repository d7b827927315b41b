"""What a denoiser is told about captions: tensors by name, the batch first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Conditioning = Mapping[str, Tensor]
"""[batch, ...] each. Where captions differ in length the second axis counts tokens, and zeros are put at its end."""


def joined(parts: Sequence[Conditioning]) -> dict[str, Tensor]:
    """Several captions as one batch."""
    return {name: _stacked([part[name] for part in parts]) for name in parts[0]}


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].ndim < 2:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    lacking = [(longest - tensor.shape[1], tensor.ndim - 2) for tensor in tensors]
    return torch.cat([F.pad(t, (*(0, 0) * rest, 0, more)) for t, (more, rest) in zip(tensors, lacking, strict=True)])
