"""How many values of a tensor are no numbers, in every dtype."""

from __future__ import annotations

import math

import pytest
import torch

from adapterkit.kernels.finite import all_finite, not_finite

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_they_are_counted(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, math.nan], [math.nan, -2.0]])
    assert not_finite(values.to(dtype)) == 2
    assert not_finite(torch.ones(3).to(dtype)) == 0


def test_a_sum_that_overflows_is_none() -> None:
    assert not_finite(torch.full((4,), torch.finfo(torch.float64).max, dtype=torch.float64)) == 0
    assert not_finite(torch.full((4,), torch.finfo(torch.float16).max, dtype=torch.float16)) == 0


def test_what_can_hold_none_is_not_looked_at() -> None:
    assert not_finite(torch.ones(3, device="meta")) == 0
    assert not_finite(torch.ones(3, dtype=torch.int64)) == 0


def test_all_of_many_are_looked_at() -> None:
    many = [torch.ones(3, 2, dtype=dtype) for dtype in FLOATS for _ in range(3)]
    many += [torch.full((1 << 16,), torch.finfo(torch.float32).max), torch.ones(0), torch.ones(2, device="meta")]
    many += [torch.full((4,), torch.finfo(torch.float32).max) for _ in range(4)]  # whose sum is infinite
    assert all_finite(many)
    assert all_finite([])
    for place, tensor in enumerate(many):
        if tensor.numel() and not tensor.is_meta:
            spoilt = tensor.clone()
            spoilt.view(-1)[-1] = math.nan
            assert not all_finite([*many[:place], spoilt, *many[place + 1 :]])
