"""Rows that are taken out of a batch and put back, and low-rank updates of each with factors of its own."""

from __future__ import annotations

import pytest
import torch

import adapterkit as ak
from adapterkit.kernels import low_rank
from adapterkit.kernels.rows import Routes, Rows
from adapterkit.points import Form, WeightLayout

LINEAR = WeightLayout("linear")


def factors(rank: int = 2, scale: float = 1.0, form: Form = "linear") -> ak.Factors:
    return ak.Factors(torch.randn(rank, 6).double(), torch.randn(4, rank).double(), WeightLayout(form), scale)


@pytest.mark.parametrize("places", [(0, 1, 2, 3), (1, 2), (3,), (2, 0, 3), ()])
def test_what_is_taken_out_is_put_back(places: tuple[int, ...]) -> None:
    x = torch.randn(4, 3)
    rows = Rows(places, 4)
    assert len(rows) == len(places)
    assert rows.is_whole == (places == (0, 1, 2, 3))
    assert torch.equal(rows.of(x), x[list(places)])
    part = torch.randn(len(places), 3)
    expected, other = x.clone(), x.clone()
    for place, one in zip(places, part, strict=True):
        expected[place] += one
        other[place] = one
    assert torch.equal(rows.added(x, part), expected)
    assert torch.equal(rows.replaced(x, part), other)
    assert rows.added(x.bfloat16(), part).dtype == torch.float32


def test_rows_in_one_piece_are_no_copy() -> None:
    x = torch.randn(4, 3)
    assert Rows(range(4), 4).of(x) is x
    assert Rows((1, 2), 4).of(x).data_ptr() == x[1:].data_ptr()


def test_routes_know_the_rows_of_each_entry() -> None:
    routes = Routes([2, 0, 3, 2, 1], entries=3)
    assert len(routes) == 5
    assert [rows.places for rows in routes.rows] == [(1,), (4,), (0, 3)]
    assert [share.tolist() for share in routes.shares] == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 1, 0]]
    assert routes.joined((2, 0)).places == (0, 3, 1)
    rows, owners = routes.mixed((2, 0))
    assert rows.places == (0, 1, 3)
    assert owners == (0, 1, 0)
    assert routes.mixed((2, 0))[0] is rows
    assert routes.kept([True, False, True]) == [1, 0, 2, 1, 2]


def test_indices_made_in_inference_mode_serve_a_backward() -> None:
    routes = Routes([0, 1, 0], entries=2)
    with torch.inference_mode():
        routes.joined((0,)).of(torch.randn(3, 2))
        assert not any(share.is_inference() for share in Routes([0, 1, 0], entries=2).shares)
    x = torch.randn(3, 2, requires_grad=True)
    routes.joined((0,)).of(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1], [0, 0], [1, 1]]


@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 2, 5, 6)])
def test_rows_with_factors_of_their_own(shape: tuple[int, ...]) -> None:
    x, several, owners = torch.randn(shape).double(), [factors(), factors(scale=0.5)], (1, 0, 1)
    found = low_rank.mixed(x, several, owners)
    expected = torch.stack([low_rank.update(row, several[owner]) for row, owner in zip(x, owners, strict=True)])
    torch.testing.assert_close(found, expected)


def test_factors_are_cast_and_not_the_input() -> None:
    x = torch.randn(2, 5, 6).bfloat16()
    assert low_rank.mixed(x, [factors(), factors()], (0, 1)).dtype == torch.bfloat16


def test_when_rows_are_computed_at_once() -> None:
    x = torch.randn(4, 3, 6)
    assert low_rank.is_mixable(x, [factors(), factors()], 4)
    assert not low_rank.is_mixable(x, [factors(2), factors(3)], 4)  # other ranks
    taller = ak.Factors(factors().A, torch.zeros(9, factors().B.shape[1]), LINEAR)
    assert not low_rank.is_mixable(x, [factors(), taller], 4)
    assert not low_rank.is_mixable(x, [factors(form="embedding")] * 2, 4)
    assert not low_rank.is_mixable(torch.randn(4, 3, 5), [factors(), factors()], 4)
    wide = ak.Factors(torch.zeros(16, 4096), torch.zeros(4096, 16), LINEAR)
    x = torch.zeros(32, 1, 4096)
    assert not low_rank.is_mixable(x, [wide] * 32, 32)  # copies cost more than 64 operations
    assert low_rank.is_mixable(x.to("meta"), [wide] * 32, 32)
    thin = ak.Factors(torch.zeros(16, 512), torch.zeros(512, 16), LINEAR)
    assert low_rank.is_mixable(torch.zeros(32, 1, 512), [thin] * 32, 32)
    assert not low_rank.is_mixable(torch.zeros(320, 1, 512), [thin] * 2, 320)


def test_their_numbers_are_sent_to_another_device_once() -> None:
    rows = Rows((2, 0), 4)
    found = rows.index(torch.device("meta"))
    assert found.device.type == "meta"
    assert found.shape == (2,)
    assert rows.index(torch.device("meta")) is found
    assert not found.is_inference()
    assert rows.index(torch.device("cpu")).tolist() == [2, 0]
    assert rows.of(torch.empty(4, 3, device="meta")).shape == (2, 3)
