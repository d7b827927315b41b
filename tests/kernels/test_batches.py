"""Which rows of a batch stand for which of the rows that adapters were chosen for."""

from __future__ import annotations

import pytest
import torch

from adapterkit.errors import RoutingError
from adapterkit.kernels.batches import Batch, Fit, Share, repeated
from adapterkit.kernels.rows import Routes

FITS: list[tuple[Batch, tuple[int, ...], list[int]]] = [
    (Batch(3), (3, 2), [0, 1, 2]),
    (Batch(4, run=2), (2, 5), [0, 2]),
    (Batch(6, run=6), (1,), [0]),
    (Batch(2, repeats="each"), (6, 5, 4), [0, 0, 0, 1, 1, 1]),
    (Batch(2, repeats="whole", copies=2), (4, 5), [0, 1, 0, 1]),
    (Batch(2, repeats="whole", copies=2), (8, 5), [0, 0, 1, 1, 0, 0, 1, 1]),
    (Batch(2, repeats="whole", copies=1), (6,), [0, 0, 0, 1, 1, 1]),
]


@pytest.mark.parametrize(("batch", "shape", "rows"), FITS)
def test_values_of_the_named_rows_go_where_their_ids_go(batch: Batch, shape: tuple[int, ...], rows: list[int]) -> None:
    fit = batch.fit(torch.zeros(shape))
    values = torch.arange(batch.named * 2).view(-1, 2)
    assert torch.equal(fit.of(values), values[rows])
    assert fit.places(tuple(range(batch.named))) == tuple(rows)
    share = Share(values[:, 0].double(), batch)
    assert share.rows(torch.zeros(shape).half()).tolist() == [2 * row for row in rows]
    assert share.rows(torch.zeros(shape).half()).dtype == torch.float16


REFUSED: list[tuple[Batch, tuple[int, ...], str]] = [
    (Batch(4, run=1, at="attn.q@model.0"), (2, 7), r"4 samples were routed, but at attn\.q@model\.0 a tensor \(2, 7\)"),
    (Batch(4, run=1), (2, 7), "has 2 rows, each of which stands for 2 samples: give these the same adapter"),
    (Batch(4, run=2), (1, 7), "each of which stands for 4 samples"),
    (Batch(6, run=4), (2, 7), "each of which stands for 3 samples"),
    (Batch(4, run=4), (3, 7), "4 samples were routed, but a tensor .* has 3 rows. Name one adapter for each row"),
    (Batch(2), (4, 5, 6), "has 4 rows. Name one adapter for each row"),
    (Batch(2, repeats="each"), (4, 5), "has 4 rows. Name one adapter for each row"),
    (Batch(2, repeats="each"), (5, 5, 6), "has 5 rows. Name one adapter"),
    (Batch(2, repeats="whole"), (6, 5), r"A pipeline with guidance repeats the batch: say routed\(\.\.\., copies=3\)"),
    (Batch(2, repeats="whole", copies=2), (6, 5), r"copies=3\), or copies=1"),
    (Batch(2, repeats="whole", copies=2), (5, 5), "has 5 rows. Name one adapter"),
    (Batch(2), (), r"a tensor \(\) has 1 rows"),
]


@pytest.mark.parametrize(("batch", "shape", "told"), REFUSED)
def test_rows_that_stand_for_nothing_that_is_known(batch: Batch, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(RoutingError, match=told):
        batch.fit(torch.zeros(shape))


def test_routes_of_a_longer_batch_are_made_once() -> None:
    batch, x = Batch(2, repeats="whole", copies=2), torch.zeros(4, 3)
    routes = Routes([1, 0], entries=2)
    longer = routes.fitted(x, batch)
    assert [rows.places for rows in longer.rows] == [(1, 3), (0, 2)]
    assert routes.fitted(torch.ones(4, 7), batch) is longer
    assert routes.fitted(torch.zeros(2, 3), batch) is routes


def test_what_overflows_where_nothing_acts_stays_out() -> None:
    share = Share(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), Batch(3))
    effect = torch.tensor([[2.0, 4.0], [float("inf"), float("nan")], [2.0, 4.0]])
    assert share.scaled(effect).tolist() == [[2, 4], [0, 0], [1, 2]]


def test_shares_are_added_and_scaled_row_by_row() -> None:
    share = Share(torch.tensor([1.0, 0.0]), Batch(2, run=2, at="x"))
    assert (2 * share).values.tolist() == (share * 2).values.tolist() == [2, 0]
    assert (share + (1 + share)).values.tolist() == [3, 1]
    assert (share + 1).batch == share.batch


@pytest.mark.parametrize(
    ("shape", "repeats", "expected"),
    [
        ((4, 3, 2), "each", [0, 0, 1, 1]),
        ((4, 3), "each", [0, 1]),
        ((5, 3, 2), "each", [0, 1]),
        ((2, 3, 2), "each", [0, 1]),
        ((4, 3, 2), "whole", [0, 1]),
    ],
)
def test_values_of_samples_are_repeated_where_each_became_several(
    shape: tuple[int, ...], repeats: str, expected: list[int]
) -> None:
    assert repeated(torch.arange(2), torch.zeros(shape), repeats).tolist() == expected  # type: ignore[arg-type]


def test_nothing_is_done_where_the_rows_are_the_named_ones() -> None:
    values = torch.arange(3)
    assert Batch(3).fit(torch.zeros(3)) == Fit()
    assert Fit().of(values) is values
