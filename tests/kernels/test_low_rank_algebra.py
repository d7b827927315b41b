"""Low-rank algebra against the dense products that it never makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapterkit.contract.factors import Factors
from adapterkit.kernels import low_rank, low_rank_algebra
from adapterkit.points import WeightLayout

LINEAR = WeightLayout("linear")
CONV = WeightLayout("conv", kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
GROUPED = WeightLayout("conv", kernel=(3,), stride=(1,), padding=(1,), dilation=(1,), groups=2)

SHAPES = {
    "linear": (LINEAR, (20, 30)),
    "wide rank": (LINEAR, (6, 30)),
    "conv": (CONV, (12, 5, 3, 3)),
    "grouped conv": (GROUPED, (12, 4, 3)),
}


def update(name: str, rank: int = 8, scale: float = 0.7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Factors:
    layout, (out, *rest) = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(s, generator=generator, dtype=dtype) for s in ((rank, *rest), (out, rank)))
    return Factors(a, b, layout, scale)


def tail(values: Tensor, rank: int) -> float:
    return float(values[rank:].square().sum().sqrt())


@pytest.mark.parametrize("name", SHAPES)
def test_decomposing_gives_the_product_and_its_singular_values(name: str):
    factors = update(name)
    dense = low_rank.dense(factors).flatten(1)
    u, s, v = low_rank_algebra.decomposed(factors)
    torch.testing.assert_close((u * s) @ v.mT, dense)
    expected = torch.linalg.svdvals(dense)[: len(s)]
    torch.testing.assert_close(s, expected)
    torch.testing.assert_close(low_rank_algebra.singular_values(factors), expected, atol=1e-6, rtol=1e-6)
    assert low_rank_algebra.norm(factors) == pytest.approx(float(dense.norm()))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_decomposing_in_float32_is_as_exact_as_its_numbers(name: str, spread: float):
    exact = update(name)
    factor = torch.logspace(-spread, spread, exact.rank, dtype=torch.float64)  # what is small in B is large in A
    a = exact.A * factor.view(-1, *(1 for _ in exact.A.shape[1:]))
    factors = Factors(a.float(), (exact.B / factor).float(), exact.layout, exact.scale)
    wide = Factors(factors.A.double(), factors.B.double(), exact.layout, exact.scale)
    dense = low_rank.dense(wide).flatten(1)
    u, s, v = low_rank_algebra.decomposed(factors)
    assert u.dtype == torch.float32
    torch.testing.assert_close(((u * s) @ v.mT).double(), dense, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(s.double(), torch.linalg.svdvals(dense)[: len(s)], atol=2e-5, rtol=1e-4)
    rank = torch.eye(len(s), dtype=torch.float32)
    assert all(torch.allclose(each.mT @ each, rank, atol=1e-3) for each in (u, v))


@pytest.mark.parametrize("name", SHAPES)
def test_recompressing_leaves_the_tail_of_the_spectrum(name: str):
    factors = update(name)
    dense = low_rank.dense(factors)
    less = low_rank_algebra.recompressed(factors, 3)
    assert (less.rank, less.scale, less.shape, less.layout) == (3, 1.0, factors.shape, factors.layout)
    error = float((low_rank.dense(less) - dense).norm())
    assert error == pytest.approx(tail(torch.linalg.svdvals(dense.flatten(1)), 3))
    assert torch.allclose(low_rank.dense(low_rank_algebra.recompressed(factors, 100)), dense)


def test_concatenating_is_the_weighted_sum_whatever_the_ranks_scales_and_dtypes():
    several = [update("conv", 2, 0.5), update("conv", 5, -2.0, seed=1), update("conv", 1, seed=2, dtype=torch.float16)]
    weights = [0.3, -1.5, 2.0]
    whole = low_rank_algebra.concatenated(several, weights)
    assert whole.rank == 8
    expected = sum(w * low_rank.dense(one).double() for w, one in zip(weights, several, strict=True))
    torch.testing.assert_close(low_rank.dense(whole).double(), expected, atol=1e-6, rtol=1e-6)


def test_inner_products_are_those_of_the_products():
    one, other = update("grouped conv", 3), update("grouped conv", 6, -1.1, seed=1)
    expected = float((low_rank.dense(one) * low_rank.dense(other)).sum())
    assert low_rank_algebra.inner(one, other) == pytest.approx(expected)
    assert low_rank_algebra.inner(other, one) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [-2.0, 1e-3])
def test_singular_values_of_an_update_whose_factors_have_a_lower_rank(scale: float):
    factors = update("linear", 4, scale)
    again = Factors(torch.cat([factors.A, factors.A]), torch.cat([factors.B, factors.B], 1), LINEAR, scale)
    values = low_rank_algebra.singular_values(again)
    expected = 2 * torch.linalg.svdvals(low_rank.dense(factors))[:4]
    torch.testing.assert_close(values[:4], expected)
    assert float(values[4:].max()) < 1e-6 * float(values[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_singular_values_in_half_precision(dtype: torch.dtype):
    factors = update("conv", 6, dtype=dtype)
    exact = Factors(factors.A.double(), factors.B.double(), CONV, factors.scale)
    expected = torch.linalg.svdvals(low_rank.dense(exact).flatten(1))
    torch.testing.assert_close(low_rank_algebra.singular_values(factors), expected[:6], atol=1e-3, rtol=1e-3)


def test_of_factors_of_less_than_full_rank_the_rest_is_zero():
    factors = update("linear", 4, dtype=torch.float32)
    again = Factors(torch.cat([factors.A, factors.A]), torch.cat([factors.B, 0 * factors.B], 1), LINEAR, 0.7)
    found = low_rank_algebra.decomposed(again)
    assert not found.S[4:].any()
    torch.testing.assert_close((found.U * found.S) @ found.V.mT, low_rank.dense(factors), atol=1e-5, rtol=1e-4)


def test_an_update_of_zero_has_no_spectrum_and_can_be_recompressed():
    factors = Factors(torch.randn(4, 10), torch.zeros(6, 4), LINEAR)
    assert low_rank_algebra.norm(factors) == 0
    assert not low_rank_algebra.singular_values(factors).any()
    assert not low_rank.dense(low_rank_algebra.recompressed(factors, 2)).any()


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 3.0])
def test_a_truncated_decomposition_is_within_two_hundredths_of_the_best(decay: float):
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 300)).Q for n in (300, 400))
    values = torch.arange(1, 301.0) ** -decay
    matrix = (u * values) @ v.mT
    found = low_rank_algebra.truncated(matrix, 8)
    assert len(found.S) == 8
    best = tail(values.double(), 8)
    assert best <= low_rank_algebra.residual(matrix, found) * (1 + 1e-5)
    assert low_rank_algebra.residual(matrix, found) <= 1.02 * best
    again = low_rank_algebra.truncated(matrix, 8)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_a_small_matrix_is_decomposed_in_full():
    torch.manual_seed(0)
    matrix = torch.randn(9, 5, dtype=torch.float64)
    found = low_rank_algebra.truncated(matrix, 3)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(matrix)[:3])
    assert len(low_rank_algebra.truncated(matrix, 50).S) == 5


@pytest.mark.parametrize("rank", [3, 40, 90])
def test_as_many_singular_values_as_are_asked_for(rank: int):
    torch.manual_seed(0)
    matrix = torch.randn(200, rank, dtype=torch.float64) @ torch.randn(rank, 100, dtype=torch.float64)

    def enough(values: Tensor, total: float) -> int | None:
        reached = values.square().cumsum(0) >= (1 - 1e-9) * total
        return int(reached.int().argmax()) + 1 if reached.any() else None

    found = low_rank_algebra.truncated_until(matrix, enough)
    assert len(found.S) == rank
    assert low_rank_algebra.residual(matrix, found) <= 1e-4 * float(matrix.norm())


def test_as_many_as_there_are_where_no_number_is_enough():
    matrix = torch.eye(40)
    assert len(low_rank_algebra.truncated_until(matrix, lambda values, total: None, start=4).S) == 40


def test_factors_of_a_convolution_compute_what_its_matrix_does():
    torch.manual_seed(0)
    weight, x = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 7, 7, dtype=torch.float64)
    factors = low_rank_algebra.truncated(weight.flatten(1), 6).factors(weight.shape, CONV)
    expected = torch.nn.functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close(low_rank.update(x, factors), expected)
