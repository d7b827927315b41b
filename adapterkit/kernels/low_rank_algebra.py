"""Algebra of low-rank updates: norms, spectra, sums and best approximations, without the dense product.

An update is the matrix `scale * B A`, [out, in / groups * kernel], of a convolution too: see `contract.factors`.
What is said of it costs `(out + in) r^2` operations; the dense product alone would cost `out in r`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.contract.factors import Factors
from adapterkit.kernels.weights import wide_dtype
from adapterkit.points import WeightLayout

_OVERSAMPLING = 16
_ENOUGH = 5e-3
"""A pass that betters the square of the error by less than this part of it is the last one."""
_SMALL = 3
"""Ranks of more than one in so many are computed by a full decomposition, which then takes no longer."""
_SEED = 0
_SHIFT, _WIDE_SHIFT, _LEAST = 1e-14, 1e-6, 1e-290
"""Of the diagonal: what makes a Gram matrix of less than full rank one that Cholesky takes; the second, where it was
computed in float32."""
_ROWS = 1024
"""What is cast at once: it stays in the processor's cache, and large matrices are not in memory twice."""
_HALF = 4
"""Bytes of a number of each of two factors in half precision."""
_ROUNDING, _NOTHING = 1e-7, 1e-30
"""Singular values below this part of the largest are rounding, where factors are in float32; so are all below that."""


class Decomposition(NamedTuple):
    """A matrix `U diag(S) V^T`: U [m, r] and V [n, r] with orthonormal columns, or 0 where S [r], descending, is."""

    U: Tensor
    S: Tensor
    V: Tensor

    def cut(self, rank: int) -> Decomposition:
        """Its best approximation of this rank (Eckart and Young 1936)."""
        return Decomposition(self.U[:, :rank], self.S[:rank], self.V[:, :rank])

    def factors(self, shape: Sequence[int], layout: WeightLayout) -> Factors:
        """As the update of a weight, with its singular values in equal shares in A and B.

        Args:
            shape: Of the weight, [out, in / groups, *kernel].
            layout: Of its point.
        """
        root = self.S.sqrt()
        a = (self.V * root).mT.reshape(len(root), *shape[1:]).contiguous()
        return Factors(a, (self.U * root).contiguous(), layout)


def matrices(factors: Factors) -> tuple[Tensor, Tensor]:
    """B [out, rank] times the scale, and A [rank, in / groups * kernel], in float32 or wider."""
    b, a = _plain(factors)
    return b * factors.scale, a


def decomposed(factors: Factors, rank: int | None = None) -> Decomposition:
    """The singular value decomposition of an update, from an SVD of the small core between its factors.

    With `B = Q R` and `A^T = P T` it is that of `R T^T`. Of factors in less than float64, Q and P are not computed: R
    and T come from their Gram matrices in float64, and `U S = B T^T V`, `V S = A^T R^T U`.

    Args:
        factors: The update.
        rank: Of how many singular values; by default of all that need not be 0.
    """
    b, a = matrices(factors)
    if b.dtype == torch.float64:
        q, r = torch.linalg.qr(b)
        p, t = torch.linalg.qr(a.mT)
        u, s, vh = torch.linalg.svd(r @ t.mT, full_matrices=False)
        return Decomposition(q @ u[:, :rank], s[:rank], p @ vh[:rank].mT)
    r, t = (_root(_gram(tall, torch.float64)).mT for tall in (b, a.mT))
    u, s, vh = torch.linalg.svd(r @ t.mT)
    s = torch.where(s > max(_ROUNDING * float(s[0]), _NOTHING), s, 0)
    inverse = torch.where(s > 0, 1 / s, 0)
    left, right = ((t.mT @ vh.mT) * inverse).to(b.dtype), ((r.mT @ u) * inverse).to(a.dtype)
    count = min(len(s) if rank is None else rank, len(b), a.shape[1])
    return Decomposition(b @ left[:, :count], s.to(b.dtype)[:count], a.mT @ right[:, :count])


def recompressed(factors: Factors, rank: int) -> Factors:
    """The best approximation of this rank, or of the update's own where that is less; its scale is 1."""
    return decomposed(factors, rank).factors(factors.shape, factors.layout)


def concatenated(several: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """`sum_i w_i * scale_i * B_i A_i` as one update of scale 1, exactly; its rank is the sum of the ranks.

    Args:
        several: Updates of one point; the first has the layout of all.
        weights: w.
    """
    pairs = [matrices(one) for one in several]
    b = torch.cat([w * b for w, (b, _) in zip(weights, pairs, strict=True)], dim=1)
    a = torch.cat([a for _, a in pairs])
    return Factors(a.unflatten(1, several[0].A.shape[1:]), b, several[0].layout)


def inner(one: Factors, other: Factors) -> float:
    """The inner product of two updates, `sum_ij X_ij Y_ij = tr((B^T D) (C A^T))`, of X = BA and Y = DC."""
    (b, a), (d, c) = _doubled(one), _doubled(other)
    return float(((b.mT @ d) * (a @ c.mT)).sum()) * one.scale * other.scale


def norm(factors: Factors) -> float:
    """The Frobenius norm of an update."""
    return max(inner(factors, factors), 0.0) ** 0.5


def singular_values(factors: Factors) -> Tensor:
    """Those of an update, descending, in float64; what is below 1e-7 of the largest is 0, or any number below that.

    From the factors' Gram matrices, some ten times quicker than `decomposed`: with `B^T B = L L^T` they are the roots
    of the eigenvalues of `L^T (A A^T) L`. Of factors in half precision, which are no more exact, the bound is 1e-3.
    """
    b, a = factors.B.detach(), factors.A.detach().flatten(1)
    half = a.element_size() + b.element_size() <= _HALF
    dtype = torch.float32 if half else torch.float64
    root = _root(_gram(b, dtype), _WIDE_SHIFT if half else _SHIFT)
    squares = torch.linalg.eigvalsh(root.mT @ _gram(a.mT, dtype) @ root).flip(0).clamp(min=0)
    squares = torch.where(squares > 1e20 * _LEAST, squares, 0)
    return squares.sqrt()[: min(len(b), a.shape[1])] * abs(factors.scale)


def _gram(tall: Tensor, dtype: torch.dtype) -> Tensor:
    """`T^T T` of a matrix with many rows, in float64; its products are computed in a dtype, some rows at a time."""
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for rows in tall.split(_ROWS):
        wide = rows.to(dtype)
        total += wide.mT @ wide
    return total


def _plain(factors: Factors) -> tuple[Tensor, Tensor]:
    """B and A as `matrices` gives them, without the scale."""
    b, a = factors.B.detach(), factors.A.detach().flatten(1)
    return b.to(wide_dtype(b.dtype)), a.to(wide_dtype(a.dtype))


def _doubled(factors: Factors) -> tuple[Tensor, Tensor]:
    """The same in float64."""
    b, a = _plain(factors)
    return b.double(), a.double()


def _root(gram: Tensor, shift: float = _SHIFT) -> Tensor:
    """L such that a Gram matrix is `L L^T`, whatever its rank; as exact for small columns as for large ones."""
    root, failed = torch.linalg.cholesky_ex(gram + torch.diag(shift * gram.diagonal() + _LEAST))
    if failed:
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp(min=0).sqrt()
    return root


def truncated(matrix: Tensor, rank: int) -> Decomposition:
    """The first `rank` singular values and vectors of a dense matrix.

    By a randomised range finder with power iterations (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms
    4.4 and 5.1), which go on until they better nothing any more. Equal matrices give equal results.

    Args:
        matrix: [m, n].
        rank: At most min(m, n) are given.

    Returns:
        Such that the error of the approximation is, to a part in a hundred, the least that there is.
    """
    matrix = matrix.detach().to(wide_dtype(matrix.dtype))
    width = rank + _OVERSAMPLING
    if width * _SMALL >= min(matrix.shape):
        return _full(matrix).cut(rank)
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(_SEED), dtype=matrix.dtype)
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    columns, error = torch.linalg.qr(matrix @ start.to(matrix.device)).Q, total
    while True:
        rows = torch.linalg.qr(matrix.mT @ columns).Q
        columns, core = torch.linalg.qr(matrix @ rows)
        u, s, vh = torch.linalg.svd(core)
        before, error = error, max(total - float(s[:rank].double().square().sum()), 0.0)
        if error >= (1 - _ENOUGH) * before:
            return Decomposition(columns @ u[:, :rank], s[:rank], rows @ vh[:rank].mT)


def truncated_until(matrix: Tensor, enough: Callable[[Tensor, float], int | None], start: int = 16) -> Decomposition:
    """As many singular values and vectors of a dense matrix as somebody asks for who has seen them.

    Args:
        matrix: [m, n].
        enough: `(values, total)` -> the rank, of the first singular values and the sum of the squares of all; None
            where it takes more of them to say.
        start: Number of the first that are shown.
    """
    total, rank, most = (
        float(torch.linalg.vector_norm(matrix.detach(), dtype=torch.float64)) ** 2,
        start,
        min(matrix.shape),
    )
    while True:
        found = truncated(matrix, min(rank, most))
        wanted = enough(found.S, total)
        if wanted is not None or rank >= most:
            return found.cut(most if wanted is None else wanted)
        rank *= 4


def residual(matrix: Tensor, approximation: Decomposition) -> float:
    """The Frobenius norm of what an approximation leaves of a matrix."""
    u, s, v = approximation
    rest = torch.addmm(matrix.detach().to(u.dtype), u * s, v.mT, alpha=-1)
    return float(torch.linalg.vector_norm(rest, dtype=torch.float64))


def _full(matrix: Tensor) -> Decomposition:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return Decomposition(u, s, vh.mT)
