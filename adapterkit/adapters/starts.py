"""How low-rank factors start from what a model was shown: inputs, covariances with the weight, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 16.0
_NEGLIGIBLE = 1e-6
_DAMPING, _INVERSE_ERROR, _MAX_DAMPING = 0.01, 0.05, 1e6


def directions(norms: Tensor) -> int:
    """How many of these singular values, the largest first, are more than rounding."""
    return int((norms > norms[0] * _NEGLIGIBLE).sum()) if len(norms) else 0


def from_gradient(grad: Tensor, rank: int) -> tuple[Tensor, Tensor] | int:
    """A and B by LoRA-GA, in whose first step the product moves as the weight would (Wang et al. 2024, eq. 7 and 8).

    A takes the first `rank` right singular vectors, B the next `rank` left ones, each times `out ** (1 / 4) / gamma **
    (1 / 2)`.

    Args:
        grad: Of the weight, [out, in].
        rank: Of the factors.

    Returns:
        [rank, in] and [out, rank]; or how many directions the gradient has, where they are fewer than `2 * rank`.
    """
    u, s, v = _leading(grad, 2 * rank)
    if (found := directions(s)) < 2 * rank:
        return found
    size = len(grad) ** 0.25 / _GAMMA**0.5
    return size * v[:, :rank].mT, size * u[:, rank:]


def from_covariance(
    weight: Tensor, covariance: Tensor, rank: int, scale: float, *, last: bool
) -> tuple[Tensor, Tensor]:
    """A and B by CorDA: of U S V^T = W C, the product `U S V^T C^-1 / scale` of some ranks (Yang et al. 2024, eq. 4).

    Args:
        weight: [out, in].
        covariance: C [in, in] of the inputs.
        rank: Of the factors.
        scale: Of the update.
        last: Take the smallest ranks (knowledge-preserved), not the largest (instruction-previewed).
    """
    damped, inverse = _inverted(covariance)
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    chosen = slice(-rank, None) if last else slice(rank)
    root = (s[chosen] / scale).sqrt()
    return root[:, None] * (vh[chosen] @ inverse), u[:, chosen] * root


def covariance_of(rows: Tensor) -> Tensor:
    """X^T X of the inputs X [n, in] of one call, over the largest of them: so long inputs do not overflow."""
    size = rows.max().abs()
    rows = rows / torch.where(size > 0, size, torch.ones_like(size))
    return rows.mT @ rows


def _inverted(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """A covariance with as much on its diagonal as makes it invertible, and its inverse."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    mean, damping = covariance.diagonal().mean(), _DAMPING
    while True:
        damped = covariance + damping * mean * identity
        inverse, failed = torch.linalg.inv_ex(damped)
        if not bool(failed) and float(torch.dist(damped @ inverse, identity)) < _INVERSE_ERROR:
            return damped, inverse
        if damping > _MAX_DAMPING:
            return identity, identity  # inputs that were all zero
        damping *= 2


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` singular vectors and values: U [out, count], S [count], V [in, count]."""
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=min(2 * count, *matrix.shape), niter=4)
    return u[:, :count], s[:count], v[:, :count]
